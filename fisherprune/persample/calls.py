"""Calls of functions, as they are seen while a model runs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherprune.persample.arguments import Arguments, all_tensors, tensors_in
from fisherprune.persample.functions import (
    FACTS,
    INDEX_ROWS,
    OWN_BACKWARD,
    READ_VALUES,
    SORT_ROWS,
    Function,
    chooses,
    keeps_places,
    values_read,
    writes,
)
from fisherprune.persample.registry import inside_of
from fisherprune.shards import PLAIN, part_in

Key = tuple[Hashable, int]
"""Names a call in each run of a model: what is called on what, and the how manieth."""


class Rows(IntEnum):
    """What is known of the rows of samples in a tensor."""

    PLAIN = 0
    MOVED = 1
    """Values decide which row is of which sample: sorted, looked up, written."""
    UNEVEN = 2
    """Values decide how many rows a sample has."""


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


def is_ragged(tensor: Tensor) -> bool:
    """Return whether it is sparse or nested: no values lie at regular places."""
    return tensor.layout != torch.strided or tensor.is_nested


def is_irregular(tensor: Tensor) -> bool:
    """Return whether no rule for rows takes it."""
    return is_transformed(tensor) or tensor.is_complex() or is_ragged(tensor)


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
        self.has_own_backward = False  # whether the model's code may change gradients
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
        if func is torch.autograd.grad:
            self.hear_of_gradients(args[1] if len(args) > 1 else kwargs["inputs"])
        tensors = all_tensors(args, kwargs)
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
            self.has_own_backward |= func.__name__ in OWN_BACKWARD
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
        if keeps_places(name):
            return kept
        if name == "_pad_packed_sequence":
            return Rows.MOVED
        if writes(name):  # its result has the rows that it had
            kept = max(self.rows_of(sources[:1]), min(kept, Rows.MOVED))
        plain = name if name.startswith("__") else name.rstrip("_")
        if chooses(plain, args, kwargs):
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

    def hear_of_gradients(self, inputs: object) -> None:
        """Hear that the model takes gradients of these tensors by itself."""

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


def _sources(func: Function, tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors whose values a function reads, not shapes or kinds alone."""
    read = values_read(func.__name__)
    return tensors if read is None else tensors[:read]
