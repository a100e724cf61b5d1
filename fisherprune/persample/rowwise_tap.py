"""A tap of a model all of whose functions are known to keep samples apart."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fisherprune.persample.arguments import (
    Arguments,
    all_tensors,
    tensors_in,
    without_tensors,
)
from fisherprune.persample.calls import MARK, Rows
from fisherprune.persample.finder import Known
from fisherprune.persample.functions import FACTS, SIZES, Function, is_in_place
from fisherprune.persample.layout import Layout, LayoutError
from fisherprune.persample.rowwise import ROWWISE, RowCall
from fisherprune.persample.tap import LayerTap


class NotRowwiseError(Exception):
    """A call of which it is not known that it keeps samples apart."""


class RowwiseTap(LayerTap):
    """Taps a batch, the samples of which are first in every tensor of them.

    Calls of functions in ``ROWWISE`` alone lead from the batch to the model's outputs;
    then it is known without a run of a sample alone that samples do not mix, and where
    they are in each call. Otherwise the run ends with an error.

    Args:
        parameters: the watched parameters by name.
        batch: the tensors of at least two samples, plain ones that count versions.
        args, kwargs: more of ``LayerTap``.
        constants: ids of the tensors that calls may read beside those of samples.

    Attributes:
        holds: whether all calls so far were of that kind, until the outputs came.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: Sequence[Tensor],
        *args: Any,
        constants: Collection[int],
        **kwargs: Any,
    ) -> None:
        self._given = {id(_whole(each)) for each in batch}
        self.holds, self._is_over, self.constants = True, False, constants
        self._sized = False
        self._versions: dict[int, int] = {}
        super().__init__(parameters, batch, *args, **kwargs)

    def mark(self, value: object, rows: Rows = Rows.PLAIN) -> None:
        """Note that tensors are of samples, and have not been changed since."""
        mark = self._run, rows
        for tensor in (value,) if type(value) is Tensor else tensors_in(value):
            tensor.__dict__[MARK] = mark
            self._versions[id(tensor)] = tensor._version

    def __torch_function__(
        self,
        func: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function, if it keeps samples apart.

        Raises:
            NotRowwiseError: where that is not known.
        """
        if func in FACTS:
            self._sized |= func in SIZES
            return func(*args, **(kwargs or {}))
        if self._is_over:
            return super().__torch_function__(func, types, args, kwargs)
        keeps, kwargs = ROWWISE.get(func), kwargs or {}
        tensors = all_tensors(args, kwargs)
        own, shared = self._sorted(tensors)
        call = RowCall(args, kwargs, own, shared, self._sized)
        if not keeps or not own or not keeps(call):
            self._refuse(func)
        if id(_whole(own[0])) in self._given and _may_write(func, args, kwargs):
            self._refuse(func)  # what it writes, another run would read
        watched = [each for each in shared if id(each) in self.keys]
        tapped = watched and torch.is_grad_enabled()
        run = self.run_shared if tapped else self.run_other
        output = run(func, (args, kwargs), tensors, watched)
        for each in output if isinstance(output, (list, tuple)) else (output,):
            plain = type(each) is Tensor and not each.is_inference()
            if not plain or each.size(0) != self.samples:
                self._refuse(func)
            each.__dict__[MARK] = self._run, Rows.PLAIN
            self._versions[id(each)] = each._version
        return output

    def _sorted(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return those of samples, and constants; none at all where there are others.

        That is also what was changed since a known call made it.
        """
        run, versions, constants = self._run, self._versions, self.constants
        own: list[Tensor] = []
        shared: list[Tensor] = []
        for tensor in tensors:
            mark = tensor.__dict__.get(MARK)
            if mark is None or mark[0] is not run:
                if id(tensor) not in constants:
                    return [], []
                shared.append(tensor)
            elif tensor._version == versions.get(id(tensor)):
                own.append(tensor)
            else:
                return [], []
        return own, shared

    def _refuse(self, func: Function) -> NoReturn:
        self.holds = False  # whoever catches the error
        raise NotRowwiseError(func.__name__)

    def end_with(self, outputs: object) -> None:
        """Note that these are the outputs; a loss of each sample alone may follow.

        Raises:
            NotRowwiseError: where the calls that were seen did not make them.
        """
        with torch._C.DisableTorchFunction():  # these questions are no calls
            seen = isinstance(outputs, Tensor) and bool(self._sorted([outputs])[0])
        if not seen:
            self._refuse(self.end_with)
        self._is_over = True

    @property
    def is_proved(self) -> bool:
        """Return whether the outputs came from such calls alone."""
        return self.holds and self._is_over

    def run_shared(
        self,
        func: Function,
        arguments: Arguments,
        tensors: list[Tensor],
        shared: list[Tensor],
    ) -> Any:
        """Run a call with shared tensors: samples come first in the others."""
        if self._is_over:  # in a loss
            self._refuse(func)
        key, first = self.key_of(func, shared), Layout(0, self.samples)
        layouts = tuple([first if self.is_marked(t) else None for t in tensors])
        input = (
            first if layouts[0] and layouts.count(None) == len(layouts) - 1 else None
        )
        self.known[key] = Known(without_tensors(arguments), layouts, first, input)
        try:
            output = self._tapped(func, arguments, tensors, key)
        except LayoutError:
            self._refuse(func)
        return output  # which is marked behind, as those of all calls


def _whole(tensor: Tensor) -> Tensor:
    """Return the tensor of which one is a view, or itself."""
    return tensor if tensor._base is None else tensor._base


def _may_write(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call may change what it reads: ``relu(x, inplace=True)``."""
    return is_in_place(func.__name__) or any(
        v is True for v in (*args, *kwargs.values())
    )
