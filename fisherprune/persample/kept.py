"""Layers that go on from batch to batch, with what they computed of constants."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fisherprune.persample.registry import Layer, LayerCall


@dataclass(frozen=True)
class _Kept:
    layer: Layer
    constants: tuple[Tensor | float, ...]
    versions: list[int]
    """Of the tensors among them."""

    def is_of(self, other: _Kept) -> bool:
        """Return whether the constants are the same, and unchanged."""
        return (
            self.versions == other.versions
            and len(self.constants) == len(other.constants)
            and all(
                a is b if isinstance(b, Tensor) else a == b
                for a, b in zip(self.constants, other.constants, strict=True)
            )
        )


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
        versions = [each._version for each in tensors]
        now = _Kept(call.layer, call.constants, versions)
        place = slice(self._number, self._number + 1)
        self._number += 1
        for before in self._kept[place]:
            if before.is_of(now):
                return replace(call, layer=before.layer)
        self._kept[place] = [now]
        return call
