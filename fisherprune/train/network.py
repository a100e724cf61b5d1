"""The network of a run."""

from __future__ import annotations

from torch import nn

from fisherprune import models
from fisherprune.masks.select import kept_counts
from fisherprune.parameters import prunable_parameters
from fisherprune.runs.config import TrainConfig
from fisherprune.streams import stream_seed
from fisherprune.train.parts import Parts


def network(config: TrainConfig, parts: Parts) -> nn.Module:
    """Return the network as a run begins with it, on the device of the images.

    Raises:
        FisherpruneError: where what the config asks to prune is not in the network.
    """
    model = models.create(
        config.model,
        len(parts.train.classes),
        parts.train.channels,
        image_size=parts.train.images.shape[-1],
        seed=stream_seed(config.seed, "initialization"),
    ).to(parts.train.images.device)
    prunable = prunable_parameters(model, config.skip)
    if config.method != "none":  # before any work, see that there are such masks
        shapes = {name: p.shape for name, p in prunable.items()}
        kept_counts(shapes, config.sparsity, config.scope, densities=config.densities)
    return model
