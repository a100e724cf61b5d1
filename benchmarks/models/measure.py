"""A row of the table: coverage as ``fisherprune.check`` says, errors against a loop."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import fisherprune as fp
from benchmarks.models.case import Case, Losses
from fisherprune.statistics.structure import (
    count_samples,
    map_tensors,
    repeated,
    some_samples,
)

LARGEST = 100_000_000
"""Weights of the largest model that a float64 loop is run for."""
NEGLIGIBLE = 1e-10
"""Norms, relative to the largest, that are zero but for rounding."""

UNUSED = "no loss of these samples depends on it"
"""A reason of the check's: gradients are zero, and found as such."""

Named = dict[str, nn.Parameter]
Row = dict[str, Any]


def measure(case: Case) -> Row:
    """Return what is known about a model; a refusal is in the row, too."""
    torch.manual_seed(0)
    model, batch = case.make()
    prepare(model, batch, case.losses)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    weights = sum(p.numel() for p in named.values())
    row: Row = {"library": case.library, "family": case.family, "model": case.name}
    row |= {"weights": weights, "prunable": prunable(model) / weights}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.FisherpruneWarning)
        found = fp.check(model, batch, losses=case.losses, parameters=named)
        row |= {"ways": ways(found), "reasons": reasons(found)}
        return row | errors(case, model, batch, [*named]) if weights <= LARGEST else row


def prepare(model: nn.Module, batch: Any, losses: Losses) -> None:
    """Move parameters that begin as constants off them, and set BatchNorm's buffers.

    Else whole branches that begin at zero have no gradients, and signals vanish.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1 or bool((parameter == parameter.min()).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
    norms = [m for m in model.modules() if isinstance(m, NORMS)]
    model.eval()
    if norms:
        measure_norms(model, batch, losses, norms)
    forget(model)


def forget(model: nn.Module) -> None:
    """Let a model forget what it computed from its parameters: then it trained."""
    model.train()
    model.eval()


NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


def measure_norms(
    model: nn.Module, batch: Any, losses: Losses, norms: list[Any]
) -> None:
    """Let the norms' buffers be the batch's, as training would."""
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        losses(model, batch)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()


def prunable(model: nn.Module) -> int:
    """Return how many weights are pruned by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.FisherpruneWarning)
        try:
            return sum(p.numel() for p in fp.prunable_parameters(model).values())
        except fp.FisherpruneError:
            return 0


def ways(found: Any) -> dict[str, float]:
    """Return the share of the weights by their ways' names; several share alike."""
    shares: dict[str, float] = {}
    total = sum(found.sizes.values())
    for name, path in found.ways.items():
        unused = found.reasons.get(name, "").startswith(UNUSED)
        for way in path or (("unused" if unused else "none"),):
            share = found.sizes[name] / total / max(len(path), 1)
            shares[way] = shares.get(way, 0.0) + share
    return dict(sorted(shares.items(), key=lambda each: -each[1]))


def reasons(found: Any) -> list[str]:
    """Return why parameters go slow ways or none, each sentence once."""
    return [*dict.fromkeys(found.reasons.values())]


def errors(case: Case, model: nn.Module, batch: Any, names: list[str]) -> Row:
    """Compare F of the model, and of its float64 copy, with the loop over samples."""
    double: Any = copy.deepcopy(model).double()
    if hasattr(getattr(double, "config", None), "_experts_implementation"):
        double.config._experts_implementation = "eager"  # others are float32's
    wide = map_tensors(in_float64, batch)
    of_loop = loop(model, batch, case.losses, names)
    single = ours(model, batch, case.losses, names)
    try:
        case.losses(double, wide)
    except RuntimeError:  # it has float32 numbers of its own
        return {"error": None, "float32 error": gap(single, of_loop)}
    forget(double)
    truth = loop(double, wide, case.losses, names)
    found = {"error": gap(ours(double, wide, case.losses, names), truth)}
    found["float32 error"] = gap(single, truth)
    return found | {"float32 loop's error": gap(of_loop, truth)}


def in_float64(tensor: Tensor) -> Tensor:
    """Return floating-point numbers as float64."""
    return tensor.double() if tensor.is_floating_point() else tensor


def loop(
    model: nn.Module, batch: Any, losses: Losses, names: list[str]
) -> dict[str, Tensor]:
    """Return the mean square of each sample's gradient, one sample at a time.

    Each is run twice and counted once: a lone sample's BatchNorm has a wrong backward
    pass in PyTorch.
    """
    named = dict(model.named_parameters())
    weights, samples = [named[n] for n in names], count_samples(batch)
    truth = {n: torch.zeros_like(named[n], requires_grad=False) for n in names}
    for i in range(samples):
        forget(model)
        loss = losses(model, repeated(some_samples(batch, slice(i, i + 1))))[0]
        grads = torch.autograd.grad(loss, weights, materialize_grads=True)
        for total, grad in zip(truth.values(), grads, strict=True):
            total.addcmul_(grad, grad, value=1 / samples)
    forget(model)
    return truth


def ours(
    model: nn.Module, batch: Any, losses: Losses, names: list[str]
) -> dict[str, Tensor]:
    """Return F in one pass."""
    named = {n: p for n, p in model.named_parameters() if n in names}
    return fp.gradient_moments(model, [batch], losses=losses, parameters=named).fisher


def gap(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the largest relative error of a parameter's F, in norm."""
    norms = {n: float(t.norm()) for n, t in truth.items()}
    known = [n for n in norms if norms[n] > NEGLIGIBLE * max(norms.values())]
    return max(float((found[n].double() - truth[n]).norm()) / norms[n] for n in known)
