"""Masked networks, dense and sparse, and their steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherprune as fp
from benchmarks.end_to_end import images
from fisherprune import models

Batch = tuple[Tensor, Tensor]
Step = Callable[[], Tensor]
Network = Any
"""A module; torch.compile's type hints do not say that it returns one."""

MASKS = {
    "random": ("random", "global"),
    "ERK": ("random", "erk"),
    "FTS": ("fts", "global"),
}
"""Kinds of masks: by criterion and scope."""
SCORED, PASSES = 64, 10
"""Images that FTS scores, and passes that set the statistics of BatchNorm before."""
LEAST = 512
"""Weights that each layer keeps: behind empty layers, as FTS leaves them in VGG19,
BatchNorm would normalize rounding errors."""


def dense_network(name: str, device: str) -> nn.Module:
    """Return the network, the same every time."""
    return models.create(name, seed=0).to(device)


def masks_of(
    model: nn.Module, kind: str, sparsities: Sequence[float], size: int
) -> list[fp.Masks]:
    """Return masks of one kind for a network, one for each sparsity."""
    criterion, scope = MASKS[kind]
    device = next(model.parameters()).device
    batch = images(SCORED, size, f"{device}")
    weights = fp.prunable_parameters(model).values()
    kept = sum(p.numel() for p in weights) * (1 - max(sparsities))
    least = min(LEAST, int(kept / 2 / len(weights)))  # small networks have not so many
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        for _ in range(PASSES):  # BatchNorm learns the statistics of images
            model(batch[0])
    model.eval()
    return fp.find_masks(
        *(model, [batch], criterion, sparsities, scope),
        min_per_layer=least,
        ties="position",
    )


def masked(model: nn.Module, masks: fp.Masks) -> nn.Module:
    """Return a copy with zeros where the masks say so."""
    model = copy.deepcopy(model)
    masks.apply_(model)
    return model


def train_step(
    model: Network, batch: Batch, amp: bool = False, form: str = "contiguous"
) -> Step:
    """Return forward, backward and a step of SGD; it returns the loss.

    The learning rate is that of no training: all ways stay at the same weights, so that
    each of their steps can be compared.
    """
    x, y = batch
    if form == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.0, momentum=0.9, weight_decay=5e-4, fused=True
    )

    def step() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16) if amp else nullcontext():
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def dense_steps(model: nn.Module, batch: Batch) -> dict[str, Step]:
    """Return the steps of a network in the forms that PyTorch has."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    compiled = torch.compile(copy.deepcopy(last), dynamic=False)
    forms = {
        "dense": train_step(copy.deepcopy(model), batch),
        "dense, channels_last": train_step(last, batch, form="channels_last"),
        "dense, channels_last, compiled": train_step(
            compiled, batch, form="channels_last"
        ),
    }
    if has_bfloat16():
        amp = copy.deepcopy(last)
        step = train_step(amp, batch, amp=True, form="channels_last")
        forms["dense, channels_last, bfloat16"] = step
    return forms


def has_bfloat16() -> bool:
    """Return whether the processor has products of bfloat16, slow otherwise."""
    return torch.cpu._is_avx512_bf16_supported()


def sparse_network(model: nn.Module, masks: fp.Masks, amp: bool = False) -> nn.Module:
    """Return a copy that trains sparsely."""
    with torch.autocast("cpu", torch.bfloat16, amp):
        return fp.sparse.compress(copy.deepcopy(model).train(), masks)


def state_bytes(model: nn.Module) -> int:
    """Bytes of weights, their gradients and momenta."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters())
