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
from fisherprune.persample.finder import Known
from fisherprune.persample.tap import LayerTap, autocast_of
from fisherprune.statistics.batches import Batch
from fisherprune.statistics.driver import tapped_batch
from fisherprune.statistics.forward import Ran
from fisherprune.statistics.passes import Task
from fisherprune.statistics.protect import evaluating
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
        must_check: whether a batch must show that its rows are whose they seem to be.
        may_last: whether the same holds for other batches of such shapes.
    """

    known: dict[Key, Known]
    places: frozenset[str]
    must_check: bool
    may_last: bool

    def check(self, tap: LayerTap, output: object) -> None:
        """See whether rows are of other samples: their parameters are ``refused``."""
        if self.must_check or tap.moved:
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

    In the model's own modes; in eval mode where the model draws random numbers, by
    which samples can't be compared.

    Raises:
        FisherpruneError: where samples mix, or the model's output has not the samples
            first.
    """
    pair = replace(batch, content=_copy(batch, slice(-2, None)), size=2)
    modes = [(module, module.training) for module in task.model.modules()]
    with evaluating(task.model, task.parameters.values()):
        for module, training in modes:
            module.training = training
        if _draws(task, forward, pair):
            for module, _ in modes:
                module.training = False
        places = _places(op, forward, pair)

        def scores(_: nn.Module, batch: Batch) -> Ran:
            args, kwargs = batch.content
            return _scores(forward(*args, **kwargs), places, batch.size)

        tap = tapped_batch(op, task, scores, pair).tap
    for name, why in tap.refused.items():
        raise not_seen(op, name, why)
    unsure = tap.finder.is_unsure
    return SampleCalls(tap.known, places, unsure or tap.must_check, not unsure)


def not_seen(op: str, name: str, why: str) -> FisherpruneError:
    """Return the error of a parameter whose gradients are not known by sample."""
    return FisherpruneError(
        f"{op}: the gradients of single samples are not seen of {name!r} ({why}): "
        "leave it out of parameters, or use gradient_moments, which can run the model "
        "sample by sample"
    )


def _copy(batch: Batch, chosen: slice) -> Any:
    """Return copies of some samples, outside of any graph."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return map_tensors(copied, some_samples(batch.content, chosen))


@torch.no_grad()
def _draws(task: Task, forward: Function, pair: Batch) -> bool:
    """Return whether the model draws random numbers of torch."""
    device = device_of(task.parameters)

    def states() -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    before = states()
    args, kwargs = _copy(pair, slice(None))
    forward(*args, **kwargs)
    return not all(map(torch.equal, before, states()))


@torch.no_grad()
def _places(op: str, forward: Function, pair: Batch) -> frozenset[str]:
    """Return where the output has the samples first, by their number in it."""
    found = []
    for size in (1, 2):
        args, kwargs = _copy(pair, slice(-size, None))
        output = named_tensors(forward(*args, **kwargs))
        found.append({name for name, t in output if _is_of(t, size)})
    places = frozenset(found[0] & found[1])
    if not places:
        raise FisherpruneError(
            f"{op}: the model's output must have a tensor of floating-point numbers "
            "with the samples first, by which is seen whether samples mix"
        )
    return places


def _is_of(tensor: Tensor, samples: int) -> bool:
    return tensor.is_floating_point() and tensor.shape[:1] == (samples,)


def _scores(output: object, places: frozenset[str], samples: int) -> Ran:
    """Return a number for each sample that depends on all of its outputs."""
    rows = [
        tensor.flatten(1)
        for name, tensor in named_tensors(output)
        if name in places and _is_of(tensor, samples)
    ]
    outputs = torch.cat(rows, 1)
    angles = torch.arange(1.0, outputs.shape[1] + 1, device=outputs.device)
    scores = (outputs * angles.sin()).sum(1)
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
