"""Layers that go on from batch to batch, with what they computed of constants."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fisherprune.persample.registry import Layer, LayerCall


@dataclass(frozen=True)
class _Kept:
    layer: Layer
    constants: tuple[Tensor | float, ...]
    facts: list[object]
    """That are the same as long as the constants are: ids and versions of tensors."""


class KeptLayers:
    """The layers of a pass that have constants, by the number of their call in a batch.

    In the next batch the call gets the same layer, where its constants are the same:
    so a GPU computes what is small once, not in each batch.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._number = 0

    def begin(self) -> None:
        """Begin the forward pass of a batch."""
        self._number = 0

    def of(self, call: LayerCall) -> LayerCall:
        """Return the next call, with the layer that is kept where there is one."""
        tensors = [each for each in call.constants if isinstance(each, Tensor)]
        if not tensors or any(each.is_inference() for each in tensors):
            return call  # those of inference mode count no versions
        facts: list[object] = [
            id(c) if isinstance(c, Tensor) else c for c in call.constants
        ]
        facts += [each._version for each in tensors]
        number, self._number = self._number, self._number + 1
        if number < len(self._kept) and self._kept[number].facts == facts:
            call.layer = self._kept[number].layer
        else:
            now = _Kept(call.layer, call.constants, facts)
            self._kept[number : number + 1] = [now]
        return call
