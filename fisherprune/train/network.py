"""The network of a run."""

from __future__ import annotations

from torch import nn

from fisherprune import models
from fisherprune.data.dataset import Dataset
from fisherprune.errors import FieldError
from fisherprune.masks.plan import Plan
from fisherprune.parameters import Parameters, prunable_parameters, transposed_names
from fisherprune.runs.parts.data import DataConfig
from fisherprune.runs.parts.mask import MaskConfig
from fisherprune.streams import stream_seed


def network(config: DataConfig, images: Dataset) -> nn.Module:
    """Return the network as a run begins with it, on the device of the images.

    Raises:
        FisherpruneError: where the source of a user's model has changed since the
            config was made.
    """
    source = models.source_hash(config.model)
    if source != config.model_source:
        wanted = f"of the source {config.model_source} that the run began with"
        raise FieldError("model", wanted, f"{config.model} of the source {source}")
    return models.create(
        config.model,
        len(images.classes),
        images.channels,
        image_size=images.images.shape[-1],
        init=config.init,
        seed=stream_seed(config.seed, "initialization"),
    ).to(images.images.device)


def check_mask(config: MaskConfig, model: nn.Module) -> None:
    """Raise FisherpruneError where the model can't be pruned as the config asks."""
    prunable = prunable_parameters(model, config.skip)
    if config.method != "none":  # before any work, see that there are such masks
        mask_plan(config, model, prunable).counts(config.sparsity)


def mask_plan(config: MaskConfig, model: nn.Module, parameters: Parameters) -> Plan:
    """Return how the config makes masks of scores.

    Raises:
        FisherpruneError: where the parameters can't be pruned so.
    """
    return Plan(
        {name: p.shape for name, p in parameters.items()},
        config.scope,
        densities=config.densities,
        min_per_layer=config.min_per_layer,
        structure=config.structure,
        transposed=transposed_names(model, parameters),
    )
