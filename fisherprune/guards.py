"""What every statistics pass checks and protects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.layers import prunable_parameters

Batches = Iterable[tuple[Tensor, Tensor]]
Parameters = dict[str, nn.Parameter]


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode with gradients on; modes and global random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(sorted(devices)), torch.enable_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def eager(model: nn.Module) -> nn.Module:
    """Return the module below ``torch.compile``: compiled code can't be tapped."""
    return getattr(model, "_orig_mod", model)


def device_of(parameters: Parameters) -> torch.device:
    """Return the device of the first parameter."""
    return next(iter(parameters.values())).device


def checked_batches(batches: Batches, device: torch.device) -> Iterator:
    """Yield the batches on ``device``, each checked to be a labelled batch."""
    for i, batch in enumerate(batches):
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair or not all(isinstance(t, Tensor) and t.dim() for t in batch):
            raise FisherpruneError(
                f"batches must yield (inputs, labels) tensors, batch {i} is "
                f"{type(batch).__name__}"
            )
        inputs, labels = batch
        if len(inputs) != len(labels) or len(inputs) == 0:
            raise FisherpruneError(
                f"batch {i} must have at least one sample and one label for each, got "
                f"{len(inputs)} inputs and {len(labels)} labels"
            )
        yield inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def checked_parameters(model: nn.Module, parameters: Parameters | None) -> Parameters:
    """Return ``parameters``, or the prunable ones, checked to be usable."""
    if parameters is None:
        parameters = prunable_parameters(model)
    if not parameters:
        raise FisherpruneError("parameters must name at least one parameter")
    own = {id(p) for p in model.parameters()}
    for name, p in parameters.items():
        if id(p) not in own:
            raise FisherpruneError(f"parameters: {name!r} is no parameter of the model")
        if not p.requires_grad:
            raise FisherpruneError(
                f"parameters: {name!r} is frozen (requires_grad=False): unfreeze it or "
                "leave it out"
            )
        if p.dtype != torch.float32:
            raise FisherpruneError(
                f"parameters: {name!r} must be float32, got {p.dtype}"
            )
    return dict(parameters)


def check_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Raise where an entry is NaN or infinite, naming the parameter.

    One read of each, and one wait for the device: a sum is finite unless an entry is
    not, or entries are so large that they overflow together, which only a closer look
    tells.
    """
    sums = [t.sum() for t in tensors.values()]
    sums = torch.stack([s.to(sums[0].device) for s in sums])
    for name, ok in zip(tensors, sums.isfinite().tolist(), strict=True):
        if not ok and not tensors[name].isfinite().all():
            raise FisherpruneError(f"{what} of {name!r} is NaN or infinite")
