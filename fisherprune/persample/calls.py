"""Calls of functions, as they are seen while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherprune.persample.registry import inside_of
from fisherprune.shards import PLAIN, part_in

Function = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Key = tuple[Hashable, int]
"""Names a call in each run of a model: what is called on what, and the how manieth."""


class Rows(IntEnum):
    """What is known of the rows of samples in a tensor."""

    PLAIN = 0
    MOVED = 1
    """Values decide which row is of which sample: sorted, looked up, written."""
    UNEVEN = 2
    """Values decide how many rows a sample has."""


CHOOSE_ROWS = frozenset(
    "argwhere masked_select nonzero unique unique_consecutive "
    "_pack_padded_sequence".split()
)
"""Functions the shape of whose result depends on values."""

SORT_ROWS = frozenset("msort sort topk".split())
"""Functions that order what they read by its values."""

INDEX_ROWS = frozenset(
    "__getitem__ __setitem__ embedding gather index_add index_copy index_put "
    "index_select put scatter scatter_add scatter_reduce take take_along_dim".split()
)
"""Functions that read rows, or write them, at given places."""

KEEP_ROWS = frozenset(
    "index_add index_copy index_fill index_put masked_scatter scatter scatter_add "
    "scatter_reduce".split()
)
"""Functions whose result has the shape of their first argument."""


READ_VALUES = frozenset(
    "tolist item numpy __int__ __index__ __bool__ __array__".split()
)
"""Functions that give Python numbers, which may become sizes."""


FACTS = frozenset(
    {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
) | {getattr(Tensor, n).__get__ for n in ("device", "dtype", "ndim", "shape")}
"""Functions that read no value, and give no tensor."""


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in arguments, in order, those in lists and tuples too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            if isinstance(each, Tensor):
                yield each
            elif isinstance(each, (list, tuple, dict)):
                yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in([*value.values()])


_NUMBERS = {int, float, bool, str, type(None), torch.dtype, torch.device}


def _all_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors in arguments, in order."""
    found: list[Tensor] = []
    for each in (*args, *kwargs.values()) if kwargs else args:
        kind = type(each)
        if kind in PLAIN:
            found.append(each)
        elif kind is tuple:  # of sizes, mostly
            for entry in each:
                if type(entry) is not int:
                    found += tensors_in(each)
                    break
        elif kind not in _NUMBERS:
            found += tensors_in(each)
    return found


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return arguments with other tensors in the places of theirs, in order."""
    kind = type(value)
    if kind in _NUMBERS or kind is tuple and all(type(v) in _NUMBERS for v in value):
        return value
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        items = [with_tensors(each, tensors) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: with_tensors(each, tensors) for key, each in value.items()}
    return value


_EMPTY = torch.empty(0, device="cpu")


def without_tensors(arguments: Arguments) -> Arguments:
    """Return arguments with an empty tensor in each place, which takes no memory."""
    return with_tensors(arguments, repeat(_EMPTY))


MARK = "_fisherprune"
"""An attribute of tensors that come from samples."""

NO_MARK = None, Rows.PLAIN


def unmark(values: Iterable[object]) -> None:
    """Take the marks from those of the values that are tensors."""
    for value in values:
        if isinstance(value, Tensor):
            value.__dict__.pop(MARK, None)
            if (part := part_in(value)) is not None:
                part.__dict__.pop(MARK, None)


def is_transformed(tensor: Tensor) -> bool:
    """Return whether it is one of ``torch.func``: batched, or differentiated."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class Tracking(TorchFunctionMode):
    """Sees which tensors all samples share, and which are of samples.

    Shared are the watched parameters and what is computed from them and from constants
    alone, with a gradient. Of samples is the batch, and what is computed from it.

    Args:
        parameters: the watched ones, by name.
        batch: the tensors of the samples.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], batch: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.keys: dict[int, Hashable] = {id(p): n for n, p in parameters.items()}
        self.roots = {id(p): frozenset([n]) for n, p in parameters.items()}
        self.computed: dict[int, Tensor] = {}  # kept: no other tensor gets their id
        self._calls: dict[Hashable, int] = {}
        self._run = object()
        self.has_read_values = False  # of samples, in Python
        self._inside = 0  # functions in whose place others run
        self.moved = False  # whether values decide whose rows a shared tensor meets
        self.mark(list(batch))

    def mark(self, value: object, rows: Rows = Rows.PLAIN) -> None:
        """Note that tensors are of samples, and what is known of their rows."""
        mark = self._run, rows
        if type(value) is Tensor:
            value.__dict__[MARK] = mark
            return
        for tensor in tensors_in(value):
            tensor.__dict__[MARK] = mark
            if (part := part_in(tensor)) is not None:
                part.__dict__[MARK] = mark

    def is_marked(self, tensor: Tensor) -> bool:
        """Return whether a tensor is of samples."""
        return self._mark_of(tensor)[0] is self._run

    def _mark_of(self, tensor: Tensor) -> tuple[object, Rows]:
        """Return the mark of a tensor; what is made a DTensor has that of its part."""
        mark = tensor.__dict__.get(MARK)
        if mark is None and (part := part_in(tensor)) is not None:
            mark = part.__dict__.get(MARK)
        return mark or NO_MARK

    def rows_of(self, tensors: Sequence[Tensor]) -> Rows:
        """Return what is known of the samples' rows in the worst of the tensors."""
        known = Rows.PLAIN
        for tensor in tensors:
            run, rows = tensor.__dict__.get(MARK) or self._mark_of(tensor)
            if run is self._run and rows > known:
                known = rows
        return known

    def __torch_function__(
        self,
        func: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function; what is computed from samples is of samples."""
        kwargs = kwargs or {}
        if func in FACTS:
            return func(*args, **kwargs)
        tensors = _all_tensors(args, kwargs)
        sources = _sources(func, tensors)
        shared, rows = self._look_at(sources)
        if shared and func.__name__ == "__get__":  # FSDP2 asks for facts now and then
            fact = func(*args, **kwargs)
            if not isinstance(fact, Tensor):
                return fact
        if shared and torch.is_grad_enabled():
            if inner := inside_of(func):
                return self._run_inside(inner, args, kwargs, tensors)
            output = self.run_shared(func, (args, kwargs), tensors, shared)
        else:
            output = self.run_other(func, (args, kwargs), tensors, shared)
        if rows is not None:
            self.has_read_values |= func.__name__ in READ_VALUES
            written = args[0] if func is Tensor.__setitem__ else output
            if isinstance(written, (Tensor, tuple, list)):
                rows = self._rows_made(func, args, kwargs, sources, rows)
                self.mark(written, rows)
        elif func is torch.randperm:  # an order of the samples, maybe
            self.mark(output)
        return output

    def _look_at(self, tensors: list[Tensor]) -> tuple[list[Tensor], Rows | None]:
        """Return the shared ones, and what is known of the rows of samples in all.

        That is None where they are of no samples.
        """
        keys, shared, known = self.keys, [], None
        for tensor in tensors:
            if id(tensor) in keys:
                shared.append(tensor)
            mark = tensor.__dict__.get(MARK)
            if mark is None and type(tensor) in PLAIN:
                continue
            run, rows = mark or self._mark_of(tensor)
            if run is self._run and (known is None or rows > known):
                known = rows
        return shared, known

    def _run_inside(
        self,
        inner: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
    ) -> Any:
        """Run what is in a function's place; it knows which rows are whose."""
        rows = self.rows_of(tensors)
        self.moved |= rows != Rows.PLAIN
        self._inside += 1
        try:
            with self:
                output = inner(*args, **kwargs)
        finally:
            self._inside -= 1
        if rows == Rows.UNEVEN:  # then the first result is so as well
            self.mark(output, Rows.MOVED)
            self.mark(next(tensors_in(output)), Rows.UNEVEN)
        elif rows == Rows.MOVED:
            self.mark(output, Rows.MOVED)
        return output

    def _rows_made(
        self,
        func: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sources: list[Tensor],
        kept: Rows,
    ) -> Rows:
        """Return what is known of the samples' rows in a result."""
        if self._inside:
            return Rows.PLAIN
        name = func.__name__
        if _keeps_places(name):
            return kept
        if name == "_pad_packed_sequence":
            return Rows.MOVED
        if writes(name):  # its result has the rows that it had
            kept = max(self.rows_of(sources[:1]), min(kept, Rows.MOVED))
        plain = name if name.startswith("__") else name.rstrip("_")
        if _chooses(plain, args, kwargs):
            return Rows.UNEVEN
        return max(kept, Rows.MOVED) if self._moves(plain, sources) else kept

    def _moves(self, name: str, sources: list[Tensor]) -> bool:
        """Return whether values of samples decide where rows are in a result."""
        if name in SORT_ROWS:
            return True
        places = sources[:1] if name == "embedding" else sources[1:]
        if name.endswith("item__"):  # samples are where the first index is
            places = places[:1]
        computed = any(self.is_marked(t) and not t.is_floating_point() for t in places)
        if name == "embedding":  # of what is computed from samples
            computed = computed and self.is_marked(sources[1])
        return name in INDEX_ROWS and computed

    def run_shared(
        self,
        func: Function,
        arguments: Arguments,
        tensors: list[Tensor],
        shared: list[Tensor],
    ) -> Any:
        """Run a function that reads shared tensors."""
        raise NotImplementedError

    def run_other(
        self,
        func: Function,
        arguments: Arguments,
        tensors: list[Tensor],
        shared: list[Tensor],
    ) -> Any:
        """Run another one; it has shared tensors where there is no gradient."""
        args, kwargs = arguments
        return func(*args, **kwargs)

    def is_shared(self, tensor: Tensor) -> bool:
        """Return whether all samples share a tensor."""
        return id(tensor) in self.keys

    def roots_of(self, shared: Sequence[Tensor]) -> frozenset[str]:
        """Return the names of the parameters that shared tensors come from."""
        if len(shared) == 1:
            return self.roots[id(shared[0])]
        return frozenset[str]().union(*(self.roots[id(t)] for t in shared))

    def key_of(self, func: Function, shared: Sequence[Tensor]) -> Key:
        """Return the key of the next call of a function with these tensors."""
        key = hash((func, *[self.keys[id(t)] for t in shared]))
        count = self._calls[key] = self._calls.get(key, 0) + 1
        return key, count

    def note_computed(self, output: object, key: Key, shared: Sequence[Tensor]) -> None:
        """Note that results of a call are shared: those that have a gradient."""
        roots = self.roots_of(shared)
        for i, tensor in enumerate(tensors_in(output)):
            if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                self.keys[id(tensor)] = hash((key, i))
                self.roots[id(tensor)] = roots
                self.computed[id(tensor)] = tensor


def twin_of(func: Function) -> Function | None:
    """Return what gives the result of a function that changes its first argument."""
    if func is Tensor.__setitem__:
        return with_item
    return getattr(Tensor, func.__name__[:-1], None)


def with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy in which the places at an index have another value."""
    changed = tensor.clone()
    changed[index] = value
    return changed


@cache
def _keeps_places(name: str) -> bool:
    """Return whether values never decide where a function's result has rows."""
    special = {"__getitem__", "_pad_packed_sequence", "repeat_interleave", "where"}
    plain = name if name.startswith("__") else name.rstrip("_")
    sets = special | CHOOSE_ROWS | SORT_ROWS | INDEX_ROWS | KEEP_ROWS
    return not writes(name) and plain not in sets


def is_in_place(name: str) -> bool:
    """Return whether a function changes its first argument: ``add_``."""
    return name.endswith("_") and not name.startswith("__")


def writes(name: str) -> bool:
    """Return whether a function's result is its first argument, or like it."""
    in_place = name == "__setitem__" or name.startswith("__i")
    return in_place or is_in_place(name) or name in KEEP_ROWS


def _chooses(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether values decide how many rows a result has."""
    if name == "__getitem__":
        index = tensors_in(args[1:])
        return any(t.dtype in (torch.bool, torch.uint8) for t in index)
    if name == "repeat_interleave":
        return not any(isinstance(n, int) for n in (*args[1:2], kwargs.get("repeats")))
    if name == "where":
        return len(args) + len(kwargs) == 1
    return name in CHOOSE_ROWS


def _sources(func: Function, tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors whose values a function reads, not shapes or kinds alone."""
    read = _reads(func.__name__)
    return tensors if read is None else tensors[:read]


@cache
def _reads(name: str) -> int | None:
    """Return how many arguments' values a function reads; None: all."""
    if name.startswith("new_") or name.endswith("_like"):
        return 0
    return 1 if name in ("to", "type_as", "expand_as") else None
