"""The gradient of the loss after steps of training, for the weights before them."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisherprune.parameters import check_finite, device_of
from fisherprune.persample.tap import running_once
from fisherprune.statistics.batches import Batch, checked_batches, grads_of
from fisherprune.statistics.flow import other_trained
from fisherprune.statistics.forward import Forward, Ran, of_losses
from fisherprune.statistics.passes import ModelStatistics, Task, register_pass
from fisherprune.statistics.plain import plain_passes
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.settings import Settings
from fisherprune.statistics.stand_ins import check_stand_ins
from fisherprune.statistics.twice import in_plain_functions, twice_differentiable

OP = "meta_gradient"


@register_pass("meta_gradient", yields=("P",))
def meta_gradient_pass(task: Task) -> ModelStatistics:
    r"""Yield the gradient of :math:`L_k(w_k)` with respect to :math:`w_0`.

    Here :math:`w_{i+1} = w_i - \eta v_{i+1}` with :math:`v_{i+1} = \mu v_i + \nabla
    L_i(w_i)`: k steps of SGD of all trainable parameters, from :math:`v_0 = 0`, where
    :math:`L_i` is the mean loss of batch i. The gradient goes back through all steps,
    second derivatives included, so the graph of k + 1 batches is in memory.

    The first k + 1 batches are read, again and again where there are fewer. BatchNorm
    has its running statistics in every step; the group size plays no part.
    """
    seen = 0
    with evaluating(task.model, task.parameters.values()), in_plain_functions():
        batches, path = _batches_of_steps(task), _Path(task)
        task = replace(task, batches=batches)
        for n, losses in plain_passes(OP, task, path.forward):
            seen, batches = seen + n, batches[1:]
            if batches:
                path.step(losses.mean(), task.settings)
            else:
                grads = path.gradient(losses.mean())
    check_finite(grads, "the meta-gradient")
    return ModelStatistics({"P": grads}, seen, task.group_size)


def _batches_of_steps(task: Task) -> list[object]:
    device, labelled = device_of(task.parameters), task.losses is None
    every = checked_batches(task.batches, device, labelled=labelled)
    count = task.settings.inner_steps + 1
    read = [batch.content for batch in islice(every, count)]
    return list(islice(cycle(read), count))


class _Path:
    """Weights on their way through steps of SGD; the model's own stay.

    Attributes:
        start: the scored weights before the first step, by the task's names.
        now: all trained weights, by the model's names.
    """

    def __init__(self, task: Task) -> None:
        trained = {id(p) for p in (task.parameters | other_trained(task)).values()}
        named = {n: p for n, p in task.model.named_parameters() if id(p) in trained}
        self.now = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
        own = {id(p): self.now[n] for n, p in named.items()}
        self.start = {name: own[id(p)] for name, p in task.parameters.items()}
        self.velocity = [torch.zeros_like(w) for w in self.now.values()]
        self.run = _Run(task.model, of_losses(task))

    def forward(self, model: nn.Module, batch: Batch) -> Ran:
        """Run the model at the weights of this step."""
        weights = {f"model.{name}": w for name, w in self.now.items()}
        with running_once(OP):  # what runs later would read the model's own
            ran: Ran = functional_call(self.run, weights, (batch,))
        check_stand_ins(OP, ran.result, model)
        return ran

    def step(self, loss: Tensor, settings: Settings) -> None:
        """Go a step further."""
        grads = twice_differentiable(OP, loss, [*self.now.values()])
        pairs = zip(self.velocity, grads, strict=True)
        self.velocity = [settings.inner_momentum * v + g for v, g in pairs]
        named = zip(self.now.items(), self.velocity, strict=True)
        self.now = {n: w - settings.inner_lr * v for (n, w), v in named}

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the gradient for the start, float32."""
        grads = grads_of(OP, loss, [*self.start.values()])
        return {n: g.float() for n, g in zip(self.start, grads, strict=True)}


class _Run(nn.Module):
    """A forward pass as a module, whose model may have other weights for once."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self.run = model, forward

    def forward(self, batch: Batch) -> Ran:
        """Run the model."""
        return self.run(self.model, batch)
