"""Forward passes: what a pass over the data computes of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fisherprune.shards import joined_parts
from fisherprune.statistics.batches import Batch
from fisherprune.statistics.likelihoods import Likelihood
from fisherprune.statistics.losses import SampleLosses, checked_sample_losses
from fisherprune.statistics.verdicts import Condition, Expect

if TYPE_CHECKING:
    from fisherprune.statistics.passes import Task


@dataclass(frozen=True)
class Ran:
    """What came of a forward pass.

    Attributes:
        result: what gradients are taken of, samples first: their losses, or scores.
        outputs: the model's, samples first; None where they are not known.
        read: the loss as a function of the outputs, where a pass asks for it.
        conditions: on its values, for ``Verdicts``.
    """

    result: Tensor
    outputs: Tensor | None = None
    read: Likelihood | None = None
    conditions: Sequence[Condition] = ()

    @property
    def likelihood(self) -> Likelihood:
        """What a pass asked for."""
        assert self.read is not None
        return self.read

    def of_first(self) -> Ran:
        """Return the same of the first sample."""
        outputs = None if self.outputs is None else self.outputs[:1]
        read = None if self.read is None else self.read.of_first()
        return replace(self, result=self.result[:1], outputs=outputs, read=read)

    def detached(self) -> Ran:
        """Return the same without a graph."""
        outputs = None if self.outputs is None else self.outputs.detach()
        return Ran(self.result.detach(), outputs, conditions=self.conditions)


Forward = Callable[[nn.Module, Batch], Ran]


def of_outputs(head: Callable[[Tensor, Tensor, Expect], Tensor]) -> Forward:
    """Return the forward pass of ``(inputs, labels)`` whose outputs ``head`` reads."""

    def forward(model: nn.Module, batch: Batch) -> Ran:
        inputs, labels = batch.content
        outputs, found = joined_parts(model(inputs)), list[Condition]()
        batch.became(outputs)
        result = head(outputs, labels, found.append)
        return Ran(result, outputs, conditions=found)

    return forward


def of_losses(task: Task) -> Forward:
    """Return the forward pass whose result are the losses of the samples, ``[N]``."""
    losses = task.losses
    if losses is None:
        return of_outputs(SampleLosses(task.loss_fn))

    def forward(model: nn.Module, batch: Batch) -> Ran:
        each, found = losses(batch.watched(model), batch.content), list[Condition]()
        result = checked_sample_losses(each, batch.size, found.append)
        return Ran(result, conditions=found)

    return forward


def of_likelihoods(
    op: str, read: Callable[[nn.Module, Batch], Likelihood], *, losses: bool
) -> Forward:
    """Return the forward pass that reads the loss as a function of the outputs.

    Args:
        op: named in errors.
        read: of ``reader_of``.
        losses: whether the result are the losses of the samples, ``[N]``; otherwise it
            is the outputs.
    """

    def forward(model: nn.Module, batch: Batch) -> Ran:
        likelihood, found = read(model, batch), list[Condition]()
        outputs = likelihood.checked(op, found.append).outputs
        result = outputs
        if losses:
            each = likelihood.losses()
            result = checked_sample_losses(each, batch.size, found.append)
        return Ran(result, outputs, likelihood, found)

    return forward
