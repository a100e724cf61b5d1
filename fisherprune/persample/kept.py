"""Layers that go on from batch to batch, with what they computed of constants."""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_

from torch import Tensor

from fisherprune.persample.registry import Layer, LayerCall

Constants = tuple[Tensor | float, ...]


@dataclass(frozen=True)
class _KeptLayer:
    layer: Layer
    constants: Constants
    tensors: list[Tensor]
    versions: list[int]

    def is_of(self, constants: Constants) -> bool:
        """Return whether constants are the same, and unchanged."""
        return (
            len(constants) == len(self.constants)
            and all(map(is_, constants, self.constants))
            and [each._version for each in self.tensors] == self.versions
        )


class KeptLayers:
    """The layers of a pass that have constants, by the number of their call in a batch.

    In the next batch the call gets the same layer, where its constants are the same:
    so a GPU computes what is small once, not in each batch.
    """

    def __init__(self) -> None:
        self._layers: list[_KeptLayer | None] = []
        self._number = 0

    def begin(self) -> None:
        """Begin the forward pass of a batch."""
        self._number = 0

    def of(self, call: LayerCall) -> LayerCall:
        """Return the next call, with the layer that is kept where there is one."""
        if not call.constants:
            return call
        number, self._number = self._number, self._number + 1
        kept = self._layers[number] if number < len(self._layers) else None
        if kept is not None and kept.is_of(call.constants):
            call.layer = kept.layer
        else:
            self._layers[number : number + 1] = [_with_versions(call)]
        return call


def _with_versions(call: LayerCall) -> _KeptLayer | None:
    """Return what is kept; None where tensors count no versions."""
    tensors = [each for each in call.constants if isinstance(each, Tensor)]
    if any(each.is_inference() for each in tensors):
        return None
    versions = [each._version for each in tensors]
    return _KeptLayer(call.layer, call.constants, tensors, versions)
