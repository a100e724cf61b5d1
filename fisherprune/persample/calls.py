"""Calls of functions, as they are seen while a model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherprune.persample.registry import inside_of

Function = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Key = tuple[Hashable, int]
"""Names a call in each run of a model: what is called on what, and the how manieth."""


CHOOSE_ROWS = frozenset(
    "argwhere masked_select nonzero repeat_interleave unique unique_consecutive "
    "_pack_padded_sequence".split()
)
"""Functions the shape of whose result depends on values."""

KEEP_ROWS = frozenset(
    "index_add index_copy index_fill index_put masked_scatter scatter scatter_add "
    "scatter_reduce".split()
)
"""Functions whose result has the shape of their first argument."""


READ_VALUES = frozenset(
    "tolist item numpy __int__ __index__ __bool__ __array__".split()
)
"""Functions that give Python numbers, which may become sizes."""


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


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return arguments with other tensors in the places of theirs, in order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, list | tuple):
        items = [with_tensors(each, tensors) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: with_tensors(each, tensors) for key, each in value.items()}
    return value


def without_tensors(arguments: Arguments) -> Arguments:
    """Return arguments with an empty tensor in each place, which takes no memory."""
    return with_tensors(arguments, repeat(torch.empty(0)))


MARK = "_fisherprune"
"""An attribute of tensors that come from samples."""


def unmark(values: Iterable[object]) -> None:
    """Take the marks from those of the values that are tensors."""
    for value in values:
        if isinstance(value, Tensor):
            value.__dict__.pop(MARK, None)


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
        self._calls: Counter[Hashable] = Counter()
        self._mark, self._uneven = object(), object()
        self.has_read_values = False  # of samples, in Python
        self._inside = 0  # functions in whose place others run
        self.mark(list(batch))

    def mark(self, value: object, uneven: bool = False) -> None:
        """Note that tensors are of samples, maybe in uneven numbers of rows."""
        mark = self._uneven if uneven else self._mark
        for tensor in tensors_in(value):
            tensor.__dict__[MARK] = mark

    def is_marked(self, tensor: Tensor) -> bool:
        """Return whether a tensor is of samples."""
        mark = tensor.__dict__.get(MARK)
        return mark is self._mark or mark is self._uneven

    def is_uneven(self, tensor: Tensor) -> bool:
        """Return whether the samples may have uneven numbers of rows in a tensor."""
        return tensor.__dict__.get(MARK) is self._uneven

    def __torch_function__(
        self,
        func: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function; what is computed from samples is of samples."""
        kwargs = kwargs or {}
        tensors = list(tensors_in(args))
        if kwargs:
            tensors += tensors_in(kwargs)
        shared = [t for t in tensors if id(t) in self.keys]
        if shared and torch.is_grad_enabled():
            if inner := inside_of(func):
                return self._run_inside(inner, args, kwargs, tensors)
            output = self.run_shared(func, (args, kwargs), tensors, shared)
        else:
            output = self.run_other(func, (args, kwargs), tensors, shared)
        sources = _sources(func, tensors)
        if any(self.is_marked(t) for t in sources):
            self.has_read_values |= func.__name__ in READ_VALUES
            if func is Tensor.__setitem__:
                output, given = None, args[0]
                self.mark(given, self.is_uneven(given))
            else:
                self.mark(output, self._makes_uneven(func, sources))
        return output

    def _run_inside(
        self,
        inner: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
    ) -> Any:
        """Run what is in a function's place; it knows which rows are whose."""
        uneven = any(self.is_uneven(t) for t in tensors)
        self._inside += 1
        try:
            with self:
                output = inner(*args, **kwargs)
        finally:
            self._inside -= 1
        if uneven:  # then the first result is so as well: packed sequences
            self.mark(next(tensors_in(output)), uneven=True)
        return output

    def _makes_uneven(self, func: Function, sources: list[Tensor]) -> bool:
        """Return whether values decide how many rows of a sample a result has."""
        name = func.__name__
        if self._inside or name == "_pad_packed_sequence":
            return False
        if name in KEEP_ROWS or is_in_place(func):
            sources = sources[:1]
        chosen = name == "__getitem__" and any(
            t.dtype in (torch.bool, torch.uint8) for t in sources[1:]
        )
        alone = name == "where" and len(sources) == 1
        chooses = chosen or alone or name in CHOOSE_ROWS
        return chooses or any(self.is_uneven(t) for t in sources)

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
        return frozenset[str]().union(*(self.roots[id(t)] for t in shared))

    def key_of(self, func: Function, shared: Sequence[Tensor]) -> Key:
        """Return the key of the next call of a function with these tensors."""
        key = hash((func, *(self.keys[id(t)] for t in shared)))
        self._calls[key] += 1
        return key, self._calls[key]

    def note_computed(self, output: object, key: Key, shared: Sequence[Tensor]) -> None:
        """Note that results of a call are shared: those that have a gradient."""
        roots = self.roots_of(shared)
        for i, tensor in enumerate(tensors_in(output)):
            if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                self.keys[id(tensor)] = hash((key, i))
                self.roots[id(tensor)] = roots
                self.computed[id(tensor)] = tensor


def is_in_place(func: Function) -> bool:
    """Return whether a function changes its first argument: ``add_``."""
    name = func.__name__
    return name.endswith("_") and not name.endswith("__")


def _sources(func: Function, tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors whose values a function reads, not shapes or kinds alone."""
    name = func.__name__
    if name.startswith("new_") or name.endswith("_like"):
        return []
    return tensors[:1] if name in ("to", "type_as", "expand_as") else tensors
