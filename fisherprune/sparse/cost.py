"""Which layers, and which networks, are faster sparse than dense.

Times are counted in multiply-adds of a dense convolution in float32, forward and
backward. The numbers were fitted by hand to single layers and steps: those for AVX-512
on a Xeon, those for AVX2 on a Zen 3, but for the copies of dense layers, which were not
measured there. Those of bfloat16 were fitted on a Zen 4, for other instructions by
leaving out what it has beyond them; but dense layers in AMX tiles on a Xeon, and beside
them sparse layers by their ratio to float32 on the Zen 4. A choice by them is the same
on every machine of a kind: runs can be repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fisherprune.ops import kernels


@dataclass(frozen=True)
class Costs:
    """What execution costs, in dense multiply-adds in float32."""

    product: float
    """A multiply-add of a dense layer."""
    kept: float
    """A multiply-add of a kept weight."""
    element: float
    """A number that a sparse layer reads or writes."""
    between: float
    """A number between sparse layers: normalization, ReLU, addition."""
    between_dense: float
    """The same between dense layers."""
    call: float
    """A call of a sparse layer and what follows it, whatever its size."""
    call_dense: float
    """A call of a dense layer and what follows it."""
    converted: float
    """A number that a dense layer between sparse ones reads or writes: it is copied
    into another layout."""


COSTS = {
    "avx512": Costs(1, 3.0, 60, 100, 300, 1e7, 7e6, 100),
    "avx2": Costs(1, 2.1, 34, 25, 60, 7e6, 3.5e6, 45),
    "portable": Costs(1, 2.1, 34, 25, 60, 7e6, 3.5e6, 45),
}
"""Of float32, by vector instructions."""
COSTS_OF_BFLOAT16 = {
    "amx": Costs(0.34, 2.0, 30, 55, 150, 1e7, 7e6, 35),
    "avx512_bf16": Costs(0.48, 1.75, 22, 28, 57, 1e7, 7e6, 20),
    "avx512": Costs(2.7, 1.75, 22, 28, 57, 1e7, 7e6, 20),
    "avx2": Costs(15, 1.6, 25, 17, 60, 7e6, 3.5e6, 20),
    "portable": Costs(15, 2.2, 21, 26, 60, 7e6, 3.5e6, 20),
}
"""Of bfloat16, by what dense products have; they are slow without instructions."""
SPARSE = nn.Conv1d, nn.Conv2d, nn.Linear


def costs_of(dtype: torch.dtype) -> Costs:
    """Return the costs of layers whose images have a dtype, on this processor."""
    capability = kernels.cpu_capability()
    if dtype != torch.bfloat16:
        return COSTS[capability]
    if capability == "avx512" and torch.cpu._is_amx_tile_supported():
        return COSTS_OF_BFLOAT16["amx"]
    if capability == "avx512" and torch.cpu._is_avx512_bf16_supported():
        return COSTS_OF_BFLOAT16["avx512_bf16"]
    return COSTS_OF_BFLOAT16[capability]


def pays(module: nn.Module, density: float, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether a layer with that share of kept weights is faster sparse.

    Among sparse layers, that is: images would be copied if it were dense. What it reads
    and writes is counted for each number of its output. On devices that have no kernels
    of their own for it, too: there it is slower. ``dtype`` is that of the images, and
    bfloat16 under autocast alone.
    """
    costs, weight = costs_of(dtype), _weight(module)
    width, moved = weight.shape[1:].numel(), 0.0
    if not isinstance(module, nn.Linear):
        channels = getattr(module, "groups", 1) * weight.shape[1]
        stride: tuple[int, ...] = module.stride  # type: ignore[assignment]
        moved = 1 + channels * prod(stride) / max(1, len(weight))
    sparse = costs.kept * density * width + costs.element * moved
    dense = costs.product * width + costs.converted * moved
    return density < 1 and sparse <= dense


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def expected_speedup(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    inputs: Tensor,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Estimate how many times faster a training step is sparse than dense, on the CPU.

    From the multiply-adds and the numbers read and written of each Conv1d, Conv2d and
    Linear: rough, and rougher where dense layers stand between sparse ones.

    Args:
        model: dense; runs on one input, in evaluation mode, and stays as it is.
        masks: bool tensors by parameter name, True = kept.
        inputs: of a step, ``[N, ...]``.
        dtype: of the images between layers, dense and sparse: float32, or bfloat16 for
            steps under autocast to it.

    Returns:
        Time of the dense step over that of the sparse one; below 1 where dense is
        faster.

    Example:
        >>> import torch
        >>> from fisherprune import models
        >>> from fisherprune.parameters import prunable_parameters
        >>> model = models.create("resnet20", seed=0)
        >>> weights = prunable_parameters(model).items()
        >>> masks = {name: torch.rand(p.shape) < 0.02 for name, p in weights}
        >>> expected_speedup(model, masks, torch.zeros(128, 3, 32, 32)) > 1
        True
    """
    costs = costs_of(dtype)
    names = {id(p): name for name, p in model.named_parameters()}
    dense = sparse = 0.0
    for layer, read, written in _calls(model, inputs):
        weight = _weight(layer)
        products = float(weight.shape[1:].numel() * written)
        plain = costs.product * products
        mask = masks.get(names.get(id(weight), ""))
        density = 1.0 if mask is None else int(mask.count_nonzero()) / mask.numel()
        dense += plain + costs.between_dense * written + costs.call_dense
        sparse += costs.between * written + costs.call
        if mask is not None and pays(layer, density, dtype):
            sparse += costs.kept * density * products + costs.element * (read + written)
        else:
            sparse += plain + costs.converted * (read + written)
    return dense / sparse if sparse else 1.0


@torch.no_grad()
def _calls(model: nn.Module, inputs: Tensor) -> list[tuple[nn.Module, int, int]]:
    """Return each call of a layer with how many numbers it reads and writes."""
    calls, count = [], len(inputs)

    def note(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        read: Tensor = (*args, *kwargs.values())[0]
        calls.append((module, count * read.numel(), count * output.numel()))

    layers = [m for m in model.modules() if type(m) in SPARSE]
    modes = [(m, m.training) for m in model.modules()]
    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        model.eval()(inputs[:1])
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return calls
