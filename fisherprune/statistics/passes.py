"""Which statistics passes there are: each registers itself, as a criterion does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, shown
from fisherprune.parameters import Parameters, checked_parameters, eager
from fisherprune.shards import any_shard
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.losses import (
    Losses,
    LossFn,
    checked_loss,
    checked_losses,
)
from fisherprune.statistics.settings import PLACES, Settings, checked_settings
from fisherprune.statistics.whole import over_whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fisherprune.statistics.parts import Part


@dataclass(frozen=True)
class ModelStatistics:
    """What passes over the data found out: all that criteria read but weights."""

    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Float32 tensors by parameter name, by the letter that formulas give them.

    They are times ``2**exponents[letter]`` where ``exponents`` has the letter.
    """
    samples: int = 0
    """Samples that a pass saw; 0 without a pass."""
    group_size: int = 1
    """Samples in a group, as in ``gradient_moments``."""
    seconds: float = 0.0
    """Wall time of the passes, when they were run."""
    cached: bool = False
    """Whether all of them were read from a cache."""
    exponents: Mapping[str, int] = field(default_factory=dict)
    """By letter, where float32 could not hold the values as they are."""

    @property
    def groups(self) -> int:
        """Return the number of groups, a smaller last one included."""
        return -(-self.samples // self.group_size)

    @property
    def passes(self) -> list[str]:
        """Return the names of the passes whose results are here."""
        return sorted(n for n, p in PASSES.items() if {*p.yields} <= self.parts.keys())

    def scaled(self, **exponents: int) -> ModelStatistics:
        """Return the same tensors, as values times powers of two."""
        return replace(self, exponents={n: e for n, e in exponents.items() if e})

    def __or__(self, other: ModelStatistics) -> ModelStatistics:
        """Join the results of two passes over the same samples."""
        if not self.parts:
            return other
        return replace(
            self,
            parts={**self.parts, **other.parts},
            exponents={**self.exponents, **other.exponents},
            seconds=self.seconds + other.seconds,
            cached=self.cached and other.cached,
        )


@dataclass(frozen=True)
class Task:
    """What a pass works on, checked."""

    model: nn.Module
    batches: Batches
    parameters: Parameters
    loss_fn: LossFn | None = None
    """Cross-entropy where it is None."""
    losses: Losses | None = None
    """In its place, for batches of any structure."""
    group_size: int = 1
    progress: bool = False
    """Whether passes show a bar."""
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    """Of the random numbers of passes; each draws from a stream of its own name."""
    found: ModelStatistics = field(default_factory=ModelStatistics)
    """What the passes that this one needs have found."""
    masks: Mapping[str, Tensor] | None = None
    """In rounds, which weights are kept; the others are zero in the model."""
    may_loop: bool = True
    """Whether the model may run once more for each sample alone, where need be."""
    process_group: ProcessGroup | None = None
    """Whose ranks have batches of their own, that count as one set of samples."""
    tensor_group: ProcessGroup | None = None
    """The ranks that hold parts of the parameters by tensor parallelism: they have the
    same batches."""
    every_rank: bool = False
    """Whether all ranks pass over these same batches, which are those of all."""
    leaves: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """What the model's forward pass uses in the place of parameters in shards."""

    @property
    def used(self) -> Parameters:
        """Return the parameters as the model's forward pass uses them."""
        return {name: self.leaves.get(name, p) for name, p in self.parameters.items()}

    part: Part | None = None
    """The parameters that are summed up; None: all."""


class LoopsError(Exception):
    """A pass would have to run the model for each sample alone, which it may not."""


def checked_task(
    model: nn.Module,
    batches: Batches,
    parameters: Parameters | None,
    loss_fn: LossFn | None = None,
    group_size: int = 1,
    progress: bool = False,
    losses: Losses | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
) -> Task:
    """Return the task if a pass can work on it: what public functions begin with.

    The arguments are those of ``gradient_moments``; batches are checked in the pass.

    Raises:
        FisherpruneError: where an argument is not what ``gradient_moments`` takes.
    """
    parameters, loss_fn = checked_parameters(model, parameters), checked_loss(loss_fn)
    if losses is not None:
        losses = checked_losses(losses)
        if loss_fn is not None:
            raise FieldError("loss_fn", "left out where losses is given", loss_fn)
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not whole or group_size < 1:
        raise FieldError("group_size", "an integer of at least 1", shown(group_size))
    if group_size >= 2**63:
        raise FieldError("group_size", "below 2^63", shown(group_size))
    settings = checked_settings(settings)
    _check_places(settings, parameters)
    options = loss_fn, losses, group_size, progress, settings, seed
    task = Task(eager(model), batches, parameters, *options)
    return replace(task, process_group=process_group)


def _check_places(settings: Settings, parameters: Parameters) -> None:
    """Refuse to keep elsewhere what is kept in shards."""
    for name in PLACES:
        value = getattr(settings, name)
        if value is not None and any_shard(parameters.values()):
            wanted = "None where parameters are in shards, as their sums are, too"
            raise FieldError(name, wanted, shown(value))


PassFunction = Callable[[Task], ModelStatistics]
"""Passes once over the batches."""


@dataclass(frozen=True)
class StatisticsPass:
    """A pass over the data.

    Attributes:
        name: by which criteria and other passes say that they need it.
        run: the pass.
        needs: names of the passes that must have run before.
        yields: letters of the parts of its result, one for each tensor of a parameter.
        check: raises where it can't work on a task; called before any pass is run.
        within: name of a pass that yields the same and more: it is run in this one's
            place, unless it would run the model for each sample alone.
        over_ranks: whether it adds up what the ranks of the task's process group find;
            otherwise each rank passes over the batches of all.
        offloads: whether it heeds ``max_accumulator_bytes`` and ``offload``.
    """

    name: str
    run: PassFunction
    needs: tuple[str, ...]
    yields: tuple[str, ...]
    check: Callable[[Task], None]
    within: str = ""
    over_ranks: bool = False
    offloads: bool = False


PASSES: dict[str, StatisticsPass] = {}
"""By name, each behind those that it needs."""


def register_pass(
    name: str,
    *,
    needs: tuple[str, ...] = (),
    yields: tuple[str, ...],
    check: Callable[[Task], None] = lambda task: None,
    within: str = "",
    over_ranks: bool = False,
    in_shards: bool = False,
    offloads: bool = False,
) -> Callable[[PassFunction], PassFunction]:
    """Register the decorated function as a pass; see ``StatisticsPass``.

    A pass that is not made for parameters ``in_shards`` sees whole ones in their place,
    all of a model at once.

    Raises:
        FisherpruneError: where the name is taken, or a pass is needed that is not
            registered before this one.
    """
    if name in PASSES:
        raise FieldError("register_pass: name", "new", f"{name!r}, which is taken")
    passes_for([*needs, *filter(None, [within])])

    def register(run: PassFunction) -> PassFunction:
        # Autograd can't save what is made in inference mode.
        run = torch.inference_mode(False)(run if in_shards else over_whole(run))
        PASSES[name] = StatisticsPass(
            name, run, needs, yields, check, within, over_ranks, offloads
        )
        return run

    return register


def passes_for(needs: Iterable[str]) -> list[StatisticsPass]:
    """Return the passes that are needed, and those which they need, in order.

    Where one yields all that another does, the other is left out.

    Raises:
        FisherpruneError: where there is no such pass.
    """
    needed = set(needs)
    if unknown := needed - PASSES.keys():
        raise FieldError(
            "needs", f"of {', '.join(sorted(PASSES))}", ", ".join(sorted(unknown))
        )
    for each in reversed(PASSES.values()):
        if each.name in needed:
            needed.update(each.needs)
    return [
        each
        for each in PASSES.values()
        if each.name in needed and each.within not in needed
    ]
