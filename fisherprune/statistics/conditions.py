"""Which settings of a model matter to scoring, as sentences."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fisherprune.modules import layer_kinds
from fisherprune.parameters import Parameters, device_of
from fisherprune.persample.functions import Function

CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing", "use_checkpoint")
"""Attributes by which modules of other libraries switch it on."""

LOSSES = {
    torch.float16: "gradients keep 3 digits, below 6e-8 they are 0 and above 65504 "
    "infinite: bfloat16 or float32 for scoring, or a scaled loss, avoids that",
    torch.bfloat16: "gradients keep 2 to 3 digits: float32 for scoring keeps 7",
}
"""What is lost, by dtype."""


def settings_of(
    model: nn.Module,
    parameters: Parameters,
    called: Collection[Function],
    samples: int,
) -> Iterator[str]:
    """Yield what the user should know before scoring.

    Args:
        model: with its modes as they will be found.
        parameters: those to score.
        called: functions that the model calls.
        samples: with which it was tried.
    """
    yield from _modes(model)
    yield from _batchnorm(model)
    yield from _zeros(model)
    yield from _dtypes(parameters)
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if frozen:
        yield (
            f"{_named(frozen)} frozen: prunable_parameters leaves such out, but passes "
            "find their gradients"
        )
    yield from _execution(model, parameters, called)
    if samples == 1:
        yield "one sample tells not whether samples of a batch mix: give at least two"


def _modes(model: nn.Module) -> Iterator[str]:
    training = [m for m in model.modules() if m.training]
    if not training:
        return
    norms = sum(isinstance(m, _BatchNorm) for m in training)
    dropouts = sum(isinstance(m, _DropoutNd) and m.p > 0 for m in training)
    counts = {"BatchNorm": norms, "dropout": dropouts}
    kinds = " and ".join(
        f"{count} of {kind}" for kind, count in counts.items() if count
    )
    among = f", among them {kinds}" if kinds else ""
    are = "modules are" if len(training) > 1 else "module is"
    yield (
        f"{len(training)} {are} in train mode{among}: scoring runs all in eval mode, "
        "and puts the modes back"
    )


def _batchnorm(model: nn.Module) -> Iterator[str]:
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if mixing := [name for name, norm in norms.items() if norm.running_mean is None]:
        yield (
            f"{_named(mixing)} BatchNorm without running statistics, which mixes "
            "samples: track_running_stats=True, or another normalization"
        )
    counts = {name: norm.num_batches_tracked for name, norm in norms.items()}
    if new := [n for n, count in counts.items() if count is not None and not count]:
        yield (
            f"{_named(new)} BatchNorm whose running statistics saw no data, mean 0 and "
            "variance 1: fisherprune.measure_batchnorm measures them"
        )


def _zeros(model: nn.Module) -> Iterator[str]:
    kinds = layer_kinds()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    weights = {
        name: module._parameters.get("weight") for name, module in layers.items()
    }
    if zero := [n for n, w in weights.items() if w is not None and not w.any()]:
        yield (
            f"{_named(zero)} initialized to zero, so no gradient comes back through "
            "such a layer: other initial values, or some steps of training, change that"
        )


def _dtypes(parameters: Parameters) -> Iterator[str]:
    for dtype, lost in LOSSES.items():
        if named := [name for name, p in parameters.items() if p.dtype == dtype]:
            yield f"{_named(named)} {_short(dtype)}: {lost}"
    if named := [n for n, p in parameters.items() if not p.is_floating_point()]:
        yield f"{_named(named)} not of real floating-point numbers: it has no score"


def _execution(
    model: nn.Module, parameters: Parameters, called: Collection[Function]
) -> Iterator[str]:
    modules = dict(model.named_modules())
    if found := [
        name
        for name, module in modules.items()
        if any(getattr(module, flag, False) is True for flag in CHECKPOINTING)
    ]:
        yield (
            f"{_named(found)} set to activation checkpointing: it must be off in eval "
            "mode, too, as passes see each call once"
        )
    if any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None)
        for module in modules.values()
    ):
        yield "compiled parts run as they are written, without torch.compile"
    scripted = [n for n, m in modules.items() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        yield f"{_named(scripted)} TorchScript, in which no calls are seen"
    device = device_of(parameters).type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        yield f"autocast is on: {_short(dtype)}: {LOSSES.get(dtype, 'as it is')}"
    if F.scaled_dot_product_attention in called:
        yield (
            "attention runs fused; grasp and prospr need second derivatives, which "
            "fused kernels lack: they run PyTorch's plain one, with memory for all "
            "pairs of positions"
        )


def _named(names: Iterable[str]) -> str:
    """Return ``'a', 'b', 'c' and 4 more are``."""
    every = list(names)
    first = ", ".join(repr(name) for name in islice(every, 3))
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return f"{first}{more} {'is' if len(every) == 1 else 'are'}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
