"""The passes that criteria need: each is run once, or read from where it was kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import Parameters, checked_parameters, device_of
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.cache import FORMAT, Entry, StatisticsCache, notice
from fisherprune.statistics.contents import UnreadableError
from fisherprune.statistics.fingerprint import fingerprint
from fisherprune.statistics.gauss_newton import gauss_newton_pass
from fisherprune.statistics.hessian_gradient import hessian_gradient_product
from fisherprune.statistics.losses import LossFn
from fisherprune.statistics.moments import (
    GradientMoments,
    checked_group_size,
    gradient_moments,
)

PARTS = {
    "moments": ("mean", "fisher"),
    "hessian": ("product",),
    "gauss_newton": ("diagonal",),
}
"""What each kind of pass yields for every parameter."""


@dataclass(frozen=True)
class ModelStatistics:
    """What the passes over the data found out: all that criteria read but weights."""

    moments: GradientMoments | None = None
    """Mean gradient and Fisher diagonal."""
    products: dict[str, Tensor] | None = None
    """Hessian-gradient products by parameter name."""
    curvature: dict[str, Tensor] | None = None
    """Gauss-Newton diagonal by parameter name."""
    samples: int = 0
    """Samples that a pass saw; 0 without a pass."""
    seconds: float = 0.0
    """Wall time of the passes, when they were run."""
    cached: bool = False
    """Whether all of them were read from a cache."""

    @property
    def kinds(self) -> frozenset[str]:
        """Return the kinds of statistics that are known."""
        known = {
            "moments": self.moments,
            "hessian": self.products,
            "gauss_newton": self.curvature,
        }
        return frozenset(kind for kind, found in known.items() if found is not None)


def statistics_of(
    model: nn.Module,
    batches: Batches,
    needs: Iterable[str],
    *,
    loss_fn: LossFn | None = None,
    group_size: int = 1,
    parameters: Parameters | None = None,
    cache: StatisticsCache | None = None,
) -> ModelStatistics:
    """Run the passes over the data that criteria need.

    Args:
        model: as in ``gradient_moments``, like ``batches``, ``group_size``, ``loss_fn``
            and ``parameters``.
        batches: not read where nothing is needed; read once for each pass and, with a
            cache, once for the key (an iterator that can be read only once is held in
            memory).
        needs: of "moments", "hessian", which includes the former, and "gauss_newton".
        loss_fn: left out with a cache, which can't tell one loss from another, and
            with "gauss_newton", which is of cross-entropy.
        group_size: samples whose mean gradient is squared as one.
        parameters: by name.
        cache: where passes are looked for, and kept; not used, with a notice on stderr,
            where the model holds what can't be read, such as a class that was typed in.

    Raises:
        FisherpruneError: for any reason of ``gradient_moments``.
    """
    parameters = checked_parameters(model, parameters)
    needs = _checked_needs(needs)
    if not needs:
        return ModelStatistics()
    if loss_fn is not None and "gauss_newton" in needs:
        raise FisherpruneError(
            "loss_fn must be left out for the Gauss-Newton diagonal (criterion obd), "
            "which is that of cross-entropy"
        )
    if isinstance(batches, Iterator) and (cache is not None or len(needs) > 1):
        batches = list(batches)
    key = None
    if cache is not None:
        key = _key(model, batches, parameters, loss_fn, checked_group_size(group_size))
        cache = cache if key else None
    device = device_of(parameters)

    def obtain(kind: str, run: Callable[[], Entry]) -> Entry:
        if cache is None:
            return _timed(run, device)
        shapes = {
            f"{part}/{name}": tuple(p.shape)
            for part in PARTS[kind]
            for name, p in parameters.items()
        }
        return cache.get(f"{key}-{kind}", shapes, lambda: _timed(run, device))

    entries, moments = {}, None
    data = {"model": model, "batches": batches, "parameters": parameters}
    if "moments" in needs:
        run = partial(_run_moments, **data, loss_fn=loss_fn, group_size=group_size)
        entries["moments"] = obtain("moments", run)
        moments = _moments(entries["moments"], parameters, group_size)
    if "hessian" in needs:
        run = partial(_run_hessian, **data, moments=moments, loss_fn=loss_fn)
        entries["hessian"] = obtain("hessian", run)
    if "gauss_newton" in needs:
        run = partial(_run_gauss_newton, **data)
        entries["gauss_newton"] = obtain("gauss_newton", run)

    def found(kind: str) -> dict[str, Tensor] | None:
        if kind not in entries:
            return None
        return _part(entries[kind], *PARTS[kind], parameters)

    return ModelStatistics(
        moments,
        found("hessian"),
        found("gauss_newton"),
        samples=next(iter(entries.values())).samples,
        seconds=sum(entry.seconds for entry in entries.values()),
        cached=all(entry.cached for entry in entries.values()),
    )


def _run_moments(model, batches, parameters, loss_fn, group_size) -> Entry:
    m = gradient_moments(
        model, batches, loss_fn, group_size=group_size, parameters=parameters
    )
    return Entry(_joined(mean=m.mean, fisher=m.fisher), m.samples, m.groups)


def _run_hessian(model, batches, parameters, loss_fn, moments) -> Entry:
    product = hessian_gradient_product(
        model, batches, moments, loss_fn, parameters=parameters
    )
    return Entry(_joined(product=product), moments.samples, moments.groups)


def _run_gauss_newton(model, batches, parameters) -> Entry:
    diagonal, samples = gauss_newton_pass(model, batches, parameters)
    return Entry(_joined(diagonal=diagonal), samples, samples)


def _moments(entry: Entry, parameters: Parameters, group_size: int) -> GradientMoments:
    mean, fisher = (_part(entry, part, parameters) for part in PARTS["moments"])
    return GradientMoments(mean, fisher, entry.samples, entry.groups, group_size)


def _checked_needs(needs: Iterable[str]) -> frozenset[str]:
    needs = frozenset(needs)
    if unknown := needs - PARTS.keys():
        raise FisherpruneError(
            f"needs must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}"
        )
    return needs | {"moments"} if "hessian" in needs else needs


def _key(
    model: nn.Module,
    batches: Batches,
    parameters: Parameters,
    loss_fn: LossFn | None,
    group_size: int,
) -> str | None:
    """Return what the statistics depend on, None where it can't all be read."""
    if loss_fn is not None:
        raise FisherpruneError(
            "statistics_of: loss_fn must be left out where a cache is used, which "
            "can't tell one function from another"
        )
    try:
        return fingerprint(
            model, batches, parameters, group_size=group_size, version=FORMAT
        )
    except UnreadableError as error:
        notice("statistics are not kept, for the model holds what can't be read", error)
        return None


def _timed(run: Callable[[], Entry], device: torch.device) -> Entry:
    start = time.perf_counter()
    entry = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return replace(entry, seconds=time.perf_counter() - start)


def _joined(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{p}/{name}": t for p, named in parts.items() for name, t in named.items()}


def _part(entry: Entry, part: str, parameters: Parameters) -> dict[str, Tensor]:
    return {n: entry.tensors[f"{part}/{n}"].to(p.device) for n, p in parameters.items()}
