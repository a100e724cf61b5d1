"""The running statistics of BatchNorm layers, measured before the scoring."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.parameters import checked_model
from fisherprune.statistics.batches import Batches, checked_batches


@torch.no_grad()
def measure_batchnorm(model: nn.Module, batches: Batches) -> None:
    """Replace the running statistics of BatchNorm layers by means over the batches.

    A new network has mean 0 and variance 1 there, which its activations do not have:
    scored so, signals vanish or explode in deep networks, and scores tie at 0. Nothing
    is trained: weights, modes and the global random state stay as they are.

    Args:
        model: runs in train mode; BatchNorm layers without running statistics, and
            networks without BatchNorm, stay as they are.
        batches: iterable of ``(inputs, labels)``, samples first, at least two samples
            in each; means and unbiased variances of the batches are averaged.

    Raises:
        FisherpruneError: where there is no batch, or one of a single sample.

    Example:
        >>> import torch, fisherprune
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(4))
        >>> fisherprune.measure_batchnorm(model, [(torch.ones(8, 4), torch.zeros(8))])
        >>> model[1].running_mean
        tensor([1., 1., 1., 1.])
    """
    modules = [*checked_model(model).modules()]
    norms = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
    modes, momenta = [m.training for m in modules], [norm.momentum for norm in norms]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    empty, cuda = True, [device] if device.type == "cuda" else []
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
        model.train()
        with torch.random.fork_rng(cuda):
            for batch in checked_batches(batches, device):
                if batch.size < 2:
                    wanted = "at least two samples in each batch, whose variance counts"
                    raise FieldError("measure_batchnorm: batches", wanted, batch.size)
                model(batch.content[0])
                empty = False
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
    if empty:
        raise FisherpruneError("measure_batchnorm: batches must hold samples, got none")
