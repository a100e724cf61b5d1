"""Where the samples are in a model's calls, found by two of them beside a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import device_of
from fisherprune.persample.calls import Key
from fisherprune.persample.contributions import Gradients
from fisherprune.persample.finder import Known
from fisherprune.persample.meeting import autocast_of
from fisherprune.persample.observing import ObservingTap
from fisherprune.persample.rows import BASE
from fisherprune.persample.tap import OWN_GRADIENTS, LayerTap, OwnGradientsError
from fisherprune.statistics.batches import Batch
from fisherprune.statistics.driver import tapped_batch
from fisherprune.statistics.forward import Ran
from fisherprune.statistics.passes import Task
from fisherprune.statistics.protect import evaluating, forgetting
from fisherprune.statistics.structure import (
    count_samples,
    map_tensors,
    named_tensors,
    some_samples,
)

Function = Callable[..., Any]
"""The model's own ``forward``."""


@dataclass(frozen=True)
class SampleCalls:
    """What was found out about a model's calls.

    Attributes:
        known: by call.
        places: of the tensors in the model's output that have the samples first.
        once: names of parameters that are used once.
        unsure: whether each batch must show that its rows are whose they seem to be.
        may_vary: whether the first batch must.
    """

    known: dict[Key, Known]
    places: frozenset[str]
    once: frozenset[str]
    unsure: bool
    may_vary: bool

    def check(self, tap: LayerTap, output: object) -> None:
        """See whether rows are of other samples: their parameters are ``refused``."""
        if self.unsure or self.may_vary or tap.moved:
            tap.check_samples(_scores(output, self.places, tap.samples).result)


def call_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """Return the batch that is the arguments of a call, samples first."""
    content = args, kwargs
    return Batch(content, count_samples(content))


def key_of(model: nn.Module, batch: Batch) -> object:
    """Return what decides which calls a model makes: shapes, switches and modes."""
    modes = tuple(module.training for module in model.modules())
    return batch.shapes, tuple(_switches(batch.content)), modes


def find_calls(op: str, task: Task, forward: Function, batch: Batch) -> SampleCalls:
    """Run the batch's last two samples, and the last one alone.

    In the model's own modes; first in eval mode where samples can't be compared in
    those: where the model draws random numbers, or does not run with one sample.

    Raises:
        FisherpruneError: where samples mix, or the model's output has not the samples
            first.
    """
    model, run = task.model, Pair(op, task, forward, batch)
    modes = [(module, module.training) for module in model.modules()]
    sparse = [m for m in model.modules() if getattr(m, "sparse", None) is True]
    with evaluating(model, task.parameters.values()):
        for module, training in modes:
            module.training = training
        for table in sparse:
            table.__dict__["sparse"] = True
        if differs := run.draws() or not run.runs_alone():
            for module, _ in modes:
                module.training = False
        run.find_places()
        tap = run.compared()
        if differs:
            for module, training in modes:
                module.training = training
            run.check(tap)
    for name, why in tap.refused.items():
        raise not_seen(op, name, why)
    once = frozenset(tap.single.values())
    unsure = tap.finder.is_unsure
    return SampleCalls(tap.known, run.places, once, unsure, tap.must_check)


def not_seen(op: str, name: str, why: str) -> FisherpruneError:
    """Return the error of a parameter whose gradients are not known by sample."""
    return FisherpruneError(
        f"{op}: the gradients of single samples are not seen of {name!r} ({why}): run "
        "the backward pass of a penalty apart, leave the parameter out, or use "
        "gradient_moments, which can run the model sample by sample"
    )


class Pair:
    """Runs the last two samples of a batch, and a few in the model's own modes.

    Args:
        op: named in errors.
        task: its model is within ``evaluating``, its parameters are watched.
        forward: the model's own.
        batch: of at least two samples.

    Attributes:
        places: as of ``SampleCalls``.
    """

    def __init__(self, op: str, task: Task, forward: Function, batch: Batch) -> None:
        self.op, self.task, self.whole = op, task, batch
        self.forward = forgetting(task.model, forward)
        self.batch = replace(batch, content=_copied(batch.content, 2), size=2)
        self.places = frozenset[str]()

    def draws(self) -> bool:
        """Return whether the model draws random numbers of torch."""
        before = self._random_states()
        self._run(2)
        return not all(map(torch.equal, before, self._random_states()))

    def runs_alone(self) -> bool:
        """Return whether the model runs with one sample."""
        try:
            self._run(1)
        except Exception:
            return False
        return True

    def _random_states(self) -> list[Tensor]:
        device, states = device_of(self.task.parameters), [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        return states

    def _run(self, samples: int) -> object:
        args, kwargs = _copied(self.batch.content, samples)
        return self.forward(*args, **kwargs)

    def find_places(self) -> None:
        """Find where the output has the samples first, by their number in it.

        Raises:
            FisherpruneError: where there is no such tensor.
        """
        places = _places(self._run(2), 2)
        if self.runs_alone():  # else the tapped run says why not
            places &= _places(self._run(1), 1)
        if not places:
            raise FisherpruneError(
                f"{self.op}: the model's output must have a tensor of floating-point "
                "numbers with the samples first, by which is seen whether samples mix"
            )
        self.places = places

    def _scores(self, batch: Batch, *, alike: bool) -> Ran:
        args, kwargs = batch.content
        output = self.forward(*args, **kwargs)
        return _scores(output, self.places, batch.size, alike=alike)

    def compared(self) -> LayerTap:
        """Compare with one of the samples alone; return the tap that knows the calls.

        Raises:
            FisherpruneError: where samples mix.
        """

        def forward(_: nn.Module, batch: Batch) -> Ran:
            return self._scores(batch, alike=True)

        batch = replace(self.batch, content=_copied(self.batch.content, 2))
        try:
            return tapped_batch(self.op, self.task, forward, batch).tap
        except OwnGradientsError as error:
            raise not_seen(self.op, min(error.names), OWN_GRADIENTS) from None

    def check(self, tap: LayerTap) -> None:
        """See whether samples mix in the model's own modes: ``refused``."""
        size = min(self.whole.size, BASE)  # of two, an order by chance is often theirs
        batch = replace(
            self.whole, content=_copied(self.whole.content, size), size=size
        )
        options = self.task.parameters, batch.tensors, size, _ignore, self.op, None
        own = ObservingTap(*options, tap.known)
        with own.forward():
            ran = self._scores(batch, alike=False)
        own.check_samples(ran.result)
        tap.refused |= own.refused


def _ignore(name: str, gradients: Gradients) -> None:
    """Take no gradients."""


def _copied(content: Any, samples: int) -> Any:
    """Return copies of the last samples, outside of any graph."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return map_tensors(copied, some_samples(content, slice(-samples, None)))


def _places(output: object, samples: int) -> frozenset[str]:
    return frozenset(n for n, t in named_tensors(output) if _is_of(t, samples))


def _is_of(tensor: Tensor, samples: int) -> bool:
    return tensor.is_floating_point() and tensor.shape[:1] == (samples,)


def _scores(
    output: object, places: frozenset[str], samples: int, *, alike: bool = False
) -> Ran:
    """Return a number for each sample that depends on all of its outputs.

    Where it is another function of each sample, gradients do not cancel out between
    samples that mix; where they are ``alike``, a sample alone has the same number.
    """
    rows = [
        tensor.flatten(1)
        for name, tensor in named_tensors(output)
        if name in places and _is_of(tensor, samples)
    ]
    outputs = torch.cat(rows, 1)
    count = outputs.shape[1] if alike else outputs.numel()
    angles = torch.arange(1.0, count + 1, device=outputs.device)
    scores = (outputs * angles.sin().view(-1, outputs.shape[1])).sum(1)
    if autocast := autocast_of():  # as exact as the calls inside are
        outputs = outputs.to(autocast[1])
    return Ran(scores, outputs)


def _switches(content: object) -> Iterator[object]:
    """Yield the plain values in arguments."""
    if isinstance(content, dict):
        yield from content
        content = [*content.values()]
    if isinstance(content, list | tuple):
        for each in content:
            yield from _switches(each)
    elif isinstance(content, bool | int | float | str | None):
        yield content
