"""What the mask of a run has left of its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.masks.masks import Masks
from fisherprune.runs.result import FlopCount, LayerCount, count_layers
from fisherprune.subnetwork import effective_masks, flops


@dataclass(frozen=True)
class Subnetwork:
    """Weights by layer, FLOPs, and why something of it is not known."""

    layers: tuple[LayerCount, ...]
    flops: FlopCount | None
    notes: tuple[str, ...]


def subnetwork_of(
    model: nn.Module,
    image: Tensor,
    parameters: Mapping[str, nn.Parameter],
    masks: Masks | None,
) -> Subnetwork:
    """Count what is left of a network.

    Args:
        model: the network.
        image: one, normalized, ``[1, C, H, W]``.
        parameters: the prunable ones.
        masks: of these; None: weights that are not zero are kept.
    """
    if masks is None:
        masks = Masks({name: p.detach() != 0 for name, p in parameters.items()})
    effective, counted, notes = None, None, []
    try:
        effective = effective_masks(model, image, masks)
    except FisherpruneError as error:
        notes.append(f"the effective sparsity is not known: {error}")
    try:
        found = flops(model, image, masks)
        counted = FlopCount(dense=found.dense, masked=found.masked)
    except FisherpruneError as error:
        notes.append(f"the FLOPs are not known: {error}")
    layers = count_layers(parameters, masks, effective)
    return Subnetwork(layers, counted, tuple(notes))
