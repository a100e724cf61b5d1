"""The product of the Hessian of the mean loss with its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.parameters import Parameters, check_finite, device_of
from fisherprune.shards import largest
from fisherprune.statistics.alike import agreed
from fisherprune.statistics.batches import (
    Batch,
    Batches,
    checked_batches,
    grads_of,
    running,
)
from fisherprune.statistics.blocks import BlockSum
from fisherprune.statistics.flow import flow_parameters
from fisherprune.statistics.forward import Forward, of_losses, of_outputs
from fisherprune.statistics.gradient import (
    GRADIENT,
    MeanGradient,
    mean_gradient,
    norm_of,
)
from fisherprune.statistics.losses import (
    Losses,
    LossFn,
    SampleLosses,
    checked_outputs,
)
from fisherprune.statistics.passes import (
    ModelStatistics,
    Task,
    checked_task,
    register_pass,
)
from fisherprune.statistics.protect import evaluating, forgetting
from fisherprune.statistics.ranks import add_up_, gathered, together
from fisherprune.statistics.scale import LEAP, scaled, shifted
from fisherprune.statistics.settings import Settings
from fisherprune.statistics.twice import in_plain_functions, twice_differentiable
from fisherprune.statistics.verdicts import Expect, Verdicts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "hessian_gradient_product"
GRADIENT_TOLERANCE = 5e-2
"""Of the same gradient found twice, where TF32 or bfloat16 may be at work."""
FAR = 32
"""Exponents of gradients, up or down, whose products are well in float32's range."""
HIGHEST = 40
"""Exponent to which the largest gradient is brought at most."""


def hessian_gradient_product(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn | None = None,
    *,
    losses: Losses | None = None,
    group_size: int = 1,
    parameters: Parameters | None = None,
    flow: str = Settings.flow,
    temperature: float = Settings.temperature,
    progress: bool = False,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    r"""Compute :math:`H m`, the Hessian of the mean loss times its gradient.

    :math:`H` is the Hessian of :math:`\frac1J \sum_j L_j` and :math:`m` its gradient,
    with respect to the parameters of the gradient flow; of the product, the entries of
    ``parameters`` are returned. It is half the gradient of :math:`\|m\|^2`. Two passes:
    the gradient, then double backpropagation, one batch at a time.

    Args:
        model: as in ``gradient_moments``.
        batches: as in ``gradient_moments``; read twice, so an iterator that can be read
            only once is held in memory.
        loss_fn: as in ``gradient_moments``.
        losses: as in ``gradient_moments``.
        group_size: as in ``gradient_moments``; it weighs the samples of a smaller last
            group.
        parameters: by name, ``prunable_parameters(model)`` by default.
        flow: "trainable", "weights" or "scored", see ``Settings``.
        temperature: what the outputs are divided by before the loss, see ``Settings``.
        progress: whether to show a bar over the batches, with tqdm, on stderr.
        process_group: as in ``gradient_moments``.

    Returns:
        The product by parameter name, float32, of the parameters' shapes.

    Raises:
        FisherpruneError: where the batches hold other samples the second time, by their
            number or by their gradient; where there is a temperature beside ``losses``;
            and for any reason of ``gradient_moments``.

    Reference:
        Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient
        Flow", 2020; Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.
    """
    with together(process_group):
        settings = Settings(flow=flow, temperature=temperature)
        options = loss_fn, group_size, progress, losses, settings, 0, process_group
        task = agreed(checked_task(model, batches, parameters, *options))
        _check_temperature(task)
        found = hessian_gradient_pass(task)
        return shifted(found.parts["Hm"], -found.exponents.get("Hm", 0))


def _check_temperature(task: Task) -> None:
    temperature = task.settings.temperature
    if task.losses is not None and temperature != 1:
        wanted = "1 where losses is given, which must divide the outputs itself"
        raise FieldError("temperature", wanted, temperature)


@register_pass("hessian", yields=("Hm",), check=_check_temperature, over_ranks=True)
def hessian_gradient_pass(task: Task) -> ModelStatistics:
    """Yield the product with the mean gradient, which a pass before finds."""
    if isinstance(task.batches, Iterator):
        task = replace(task, batches=list(task.batches))
    flow = replace(task, parameters=flow_parameters(task))
    forward = _forward(task)
    with in_plain_functions():  # fused attention has no second derivative
        first, exponent = _gradient_in_range(task, flow, forward)
        check_finite(first.mean, GRADIENT)
        product = _product(task, flow, forward, first, exponent)
    result = ModelStatistics({"Hm": product}, first.all_samples, task.group_size)
    return result.scaled(Hm=2 * exponent)


def _forward(task: Task) -> Forward:
    """Return the forward pass whose result are the losses of the samples."""
    temperature = task.settings.temperature
    if temperature == 1:
        return of_losses(task)
    losses = SampleLosses(task.loss_fn)

    def head(outputs: Tensor, labels: Tensor, expect: Expect) -> Tensor:
        return losses(checked_outputs(outputs, labels) / temperature, labels, expect)

    return of_outputs(head)


def _gradient_in_range(
    task: Task, flow: Task, forward: Forward
) -> tuple[MeanGradient, int]:
    """Return the gradient of the flow, and the exponent of its losses' factor.

    With that the product will be in float32's range: 0 for ordinary networks.
    """
    found, exponent = mean_gradient(OP, flow, forward), 0
    for _ in range(2):
        other = _better(found, task.parameters, exponent)
        if other == exponent:
            break
        again = mean_gradient(OP, flow, forward, other)
        if math.isfinite(found.spread) and not math.isfinite(again.spread):
            break  # float16 within the model
        found, exponent = again, other
    return found, exponent


def _better(found: MeanGradient, scored: Parameters, exponent: int) -> int:
    """Return the exponent with which the scored gradients are near 1, if that may be.

    Others of the flow may be much larger.
    """
    tops = largest(found.mean, absolute=True)
    top, highest = max(tops[name] for name in scored), max(tops.values())
    if not math.isfinite(found.spread):
        return exponent if exponent < 0 else exponent - LEAP
    if not highest:
        return exponent if exponent > 0 else exponent + LEAP
    size, room = math.frexp(top)[1], HIGHEST - math.frexp(highest)[1]
    if top and abs(size) <= FAR and room >= -8:
        return exponent
    away = min(-size, room) if top else room
    return exponent + away if abs(away) > 8 else exponent


def _product(
    task: Task, flow: Task, forward: Forward, first: MeanGradient, exponent: int
) -> dict[str, Tensor]:
    """Pass over the batches again; return the product of the scored parameters."""
    names, weights = list(task.parameters), list(flow.parameters.values())
    vector, seen = list(first.mean.values()), 0
    verdicts = Verdicts()
    forward = forgetting(task.model, forward)
    with evaluating(task.model, weights):
        gradient = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
        product = [torch.zeros_like(v) for v in gradient[: len(names)]]
        sums = BlockSum([*gradient, *product])
        for batch in _again(task):
            n = batch.size
            with running(OP, batch):
                ran = forward(task.model, batch if n > 1 else batch.alone(0))
            verdicts.expect(ran.conditions)
            losses = ran.result[:n]
            share = _sample_weights(seen, n, first, task.group_size)
            loss = scaled(losses @ share.to(losses), exponent)
            parts = _vector_hessian(loss, weights, vector, len(names))
            sums.make_room(1)
            for total, part in zip(sums.blocks, parts, strict=True):
                total += part.detach()
            seen += n
        verdicts.settle()
        sums.finish()
    _check_count(seen, first)
    gathered(task, OP, None)
    add_up_(task, [*gradient, *product])
    _check_same(gradient, first)
    return dict(zip(names, product, strict=True))


def _again(task: Task) -> Iterator[Batch]:
    title, labelled = OP if task.progress else "", task.losses is None
    device = device_of(task.parameters)
    return checked_batches(task.batches, device, title, labelled=labelled)


def _vector_hessian(
    loss: Tensor, weights: Sequence[Tensor], vector: Sequence[Tensor], scored: int
) -> list[Tensor]:
    """Return the gradient, and the product of the first ``scored`` of the weights."""
    grads = twice_differentiable(OP, loss, weights)
    along = [(g * v).sum() for g, v in zip(grads, vector, strict=True)]
    along = [each for each in along if each.requires_grad]
    wanted = weights[:scored]
    if not along:  # a loss that is linear in the weights
        return [*grads, *(torch.zeros_like(w) for w in wanted)]
    ones = [torch.ones_like(each) for each in along]
    return [*grads, *grads_of(OP, along, wanted, grad_outputs=ones)]


def _check_count(seen: int, first: MeanGradient) -> None:
    """Refuse where the batches held more or fewer samples than in the first pass."""
    if seen != first.samples:
        raise FisherpruneError(
            f"{OP}: batches must hold the same "
            f"{first.samples} samples again, got {seen}; a list or DataLoader does"
        )


def _check_same(gradient: Sequence[Tensor], first: MeanGradient) -> None:
    """Refuse where the batches held other samples than in the first pass."""
    expected = list(first.mean.values())
    error = norm_of([g - e for g, e in zip(gradient, expected, strict=True)])
    if error > GRADIENT_TOLERANCE * (norm_of(expected) + 0.02 * first.spread):
        raise FisherpruneError(
            f"{OP}: batches must hold the same samples again, but "
            "their gradient is another; a DataLoader with a generator of its own draws "
            "others each time: make a list of its batches"
        )


def _sample_weights(
    seen: int, count: int, first: MeanGradient, group_size: int
) -> Tensor:
    """Return the weights of samples ``seen ...`` in the mean over groups of means."""
    groups = -(-first.samples // group_size)
    group = torch.arange(seen, seen + count) // group_size
    last = first.samples - (groups - 1) * group_size
    sizes = torch.where(group < groups - 1, group_size, last)
    return 1.0 / (first.groups * sizes.double())
