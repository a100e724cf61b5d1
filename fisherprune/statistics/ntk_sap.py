"""What masks change in the tangent kernel of a network that is not trained yet."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.modules import copied
from fisherprune.parameters import check_finite
from fisherprune.persample.tap import running_once
from fisherprune.shards import check_whole
from fisherprune.statistics.batches import Batch, grads_of, running
from fisherprune.statistics.batchnorm import measure_batchnorm
from fisherprune.statistics.driver import batches_of
from fisherprune.statistics.losses import checked_outputs
from fisherprune.statistics.passes import ModelStatistics, Task, register_pass
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.redraw import redraw_
from fisherprune.statistics.stand_ins import check_stand_ins
from fisherprune.streams import stream, stream_seed

OP = "ntk_sap"


def _check_losses(task: Task) -> None:
    if task.losses is not None:
        raise FisherpruneError(
            "losses must be left out for the pass ntk_sap, which reads the outputs of "
            "the model and no loss"
        )
    named = dict(task.model.named_parameters())
    instead = "score the model before it is split: ntk_sap draws weights in a copy"
    check_whole("parameters", instead, named)


@register_pass("ntk_sap", yields=("K",), check=_check_losses)
def ntk_sap_pass(task: Task) -> ModelStatistics:
    r"""Yield the gradient of a mean squared distance with respect to the masks.

    .. math:: \frac{1}{\epsilon^2} \| f(x; c \odot \theta)
              - f(x; c \odot (\theta + \epsilon \delta)) \|^2

    The derivative for c at the task's masks, or at 1, is 0 where nothing is kept. Its
    mean is over samples x and perturbations :math:`\delta` of the scored parameters,
    with entries from N(0, 1), and over initializations :math:`\theta`, drawn by the
    model's modules. Each batch has ``ntk_draws`` of all three; of a batch itself the
    shape of its inputs is read. BatchNorm has the statistics of the x, as constants.
    """
    ours = _Drawn(task)
    seen, samples = 0, 0
    with evaluating(ours.model, ()):
        for batch in batches_of(OP, task):
            inputs = _checked_inputs(batch)
            for draw in range(task.settings.ntk_draws):
                with running(OP, batch):
                    samples += ours.add(inputs, f"{batch.index}.{draw}")
            seen += batch.size
    found = {n: (total / samples).float() for n, total in ours.totals.items()}
    check_finite(found, "the gradient of ntk_sap")
    return ModelStatistics({"K": found}, seen, task.group_size)


def _checked_inputs(batch: Batch) -> Tensor:
    inputs = batch.content[0]
    if not inputs.is_floating_point():
        wanted = "of floating-point numbers, in whose place ntk_sap draws others"
        raise FieldError("inputs", wanted, shown(inputs.dtype))
    return inputs


class _Drawn:
    """A copy of the model, with other weights and inputs each time.

    Attributes:
        model: the copy.
        totals: sums over samples, float64, by the task's names.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = copied(OP, task.model).requires_grad_(False)
        own = {id(p): name for name, p in task.model.named_parameters()}
        self.names = {name: own[id(p)] for name, p in task.parameters.items()}
        for each in self.names.values():  # so that the graph tells where it is read
            self.model.get_parameter(each).requires_grad_(True)
        self.totals = {
            name: torch.zeros_like(p, dtype=torch.float64)
            for name, p in task.parameters.items()
        }

    def add(self, inputs: Tensor, which: str) -> int:
        """Draw once; return for how many samples: two where there is one."""
        seed, epsilon = self.task.seed, self.task.settings.ntk_epsilon
        redraw_(OP, self.model, stream_seed(seed, f"{OP} weights {which}"))
        generator = stream(seed, f"{OP} {which}")
        shape = max(2, len(inputs)), *inputs.shape[1:]  # BatchNorm needs two
        x = _normal(shape, generator).to(inputs)
        weights, steps = self._masked_weights(generator)
        measure_batchnorm(self.model, [(x, x)])
        masks = {n: torch.ones_like(w, requires_grad=True) for n, w in weights.items()}
        here = self._outputs({n: c * weights[n] for n, c in masks.items()}, x)
        moved = {n: c * (weights[n] + epsilon * steps[n]) for n, c in masks.items()}
        distance = ((here - self._outputs(moved, x)) / epsilon).square().sum()
        grads = grads_of(OP, distance, [*masks.values()])
        for total, grad in zip(self.totals.values(), grads, strict=True):
            total += grad
        return len(x)

    def _masked_weights(
        self, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the scored weights and steps from them, 0 where nothing is kept.

        By the model's names; the weights are those in the model.
        """
        weights, steps = {}, {}
        for name, own in self.names.items():
            weights[own] = self.model.get_parameter(own).data
            steps[own] = _normal(weights[own].shape, generator).to(weights[own])
            if self.task.masks is not None:
                weights[own] *= self.task.masks[name]
                steps[own] *= self.task.masks[name]
        return weights, steps

    def _outputs(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        with running_once(OP):  # what runs later would read the model's own
            found = checked_outputs(functional_call(self.model, weights, (x,)), x)
        check_stand_ins(OP, found, self.model)
        return found


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw from N(0, 1), alike on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
