r"""Losses of outputs whose labels have a distribution, and so a known Hessian.

Each is minus the logarithm of a probability, times a factor of each position. With it
come the gradient for labels that are drawn from the model, and a root of the Hessian
with respect to the outputs: columns s with :math:`\sum s s^\top` that Hessian.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.statistics.sample_streams import SampleStreams
from fisherprune.statistics.verdicts import Condition, Expect, at_once


@dataclass(frozen=True)
class Likelihood(ABC):
    """A loss of a batch's outputs.

    Attributes:
        outputs: the model's ``[N, *]``, with their graph.
        losses: returns the losses of the labels that were given, ``[N]``.
    """

    outputs: Tensor
    losses: Callable[[], Tensor]

    @property
    @abstractmethod
    def columns(self) -> int:
        """Return how many columns ``roots`` yields."""

    @abstractmethod
    def roots(self) -> Iterator[Tensor]:
        """Yield the columns of a root of the Hessian, float32, like the outputs."""

    @abstractmethod
    def drawn_root(self, numbers: SampleStreams) -> Tensor:
        """Return the sum of the columns of each sample times random signs.

        Its square along any direction has the Hessian's as its expectation, and at most
        twice the square of that as its variance.
        """

    @abstractmethod
    def drawn_gradient(self, numbers: SampleStreams) -> Tensor:
        """Return the gradient of the losses for drawn labels, float32."""

    def of_first(self) -> Likelihood:
        """Return the same of the first sample alone."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        rows = {n: v[:1] for n, v in found.items() if n in self._of_samples}
        losses = self.losses
        return replace(self, **rows, losses=lambda: losses()[:1])

    @property
    def _of_samples(self) -> tuple[str, ...]:
        """Return the names of the fields with samples first."""
        return ("outputs",)

    def checked(self, op: str, expect: Expect = at_once) -> Likelihood:
        """Return the same if the outputs are finite and depend on a parameter.

        Args:
            op: named in errors.
            expect: takes the condition that they are finite.

        Raises:
            FisherpruneError: where they are not.
        """
        if not self.outputs.requires_grad:
            raise FisherpruneError(
                f"{op}: the model's output must depend on a parameter of the model"
            )
        outputs = self.outputs.detach()
        finite = outputs.isfinite().flatten(1).all(1)

        def infinite() -> FisherpruneError:
            bad = int((~finite).nonzero()[0, 0])
            values = outputs[bad].flatten()
            return FisherpruneError(
                f"{op}: the model's output must be finite, got "
                f"{values[~values.isfinite()][0].item()} for sample {bad} of a batch"
            )

        expect(Condition(finite.all(), infinite))
        return self


@dataclass(frozen=True)
class Elementwise(Likelihood):
    """A loss of each output by itself, with a diagonal Hessian.

    Attributes:
        share: what the loss of each output is multiplied by.
    """

    share: float

    @property
    @abstractmethod
    def curvature(self) -> Tensor:
        """Return the diagonal of the Hessian, ``[N, K]``."""

    @property
    def _values(self) -> Tensor:
        """The outputs, ``[N, K]``."""
        return self.outputs.detach().reshape(len(self.outputs), -1)

    @property
    def _places(self) -> Tensor:
        values = self._values
        return torch.arange(values.shape[1], device=values.device).expand(values.shape)

    @property
    def columns(self) -> int:
        """One for each output."""
        return self._values.shape[1]

    def roots(self) -> Iterator[Tensor]:
        """Yield the column of one output after the other."""
        root = self.curvature.sqrt().float()
        for k in range(root.shape[1]):
            column = torch.zeros_like(root)
            column[:, k] = root[:, k]
            yield column.view(self.outputs.shape)

    def drawn_root(self, numbers: SampleStreams) -> Tensor:
        """Return the columns' sum with signs."""
        signs = numbers.signs(self._places)
        return (self.curvature.sqrt().float() * signs).view(self.outputs.shape)


class Bernoulli(Elementwise):
    r"""Binary cross-entropy of logits: labels are 1 with probability :math:`\sigma(o)`.

    The gradient is :math:`a (\sigma(o) - y)`, the Hessian :math:`a \sigma(o)
    \sigma(-o)`, with a the share.
    """

    @property
    def curvature(self) -> Tensor:
        """Return the diagonal of the Hessian, ``[N, K]``."""
        values = self._values.double()
        return self.share * values.sigmoid() * (-values).sigmoid()

    def drawn_gradient(self, numbers: SampleStreams) -> Tensor:
        """Return the gradient for a label of each output."""
        p = self._values.double().sigmoid()
        found = self.share * (p - (numbers.uniforms(self._places) < p).double())
        return found.float().view(self.outputs.shape)


class Gaussian(Elementwise):
    r"""Squared error: labels are the outputs plus noise of variance 1.

    The gradient is :math:`2 a (o - y)`, the Hessian :math:`2 a`, with a the share.
    """

    @property
    def curvature(self) -> Tensor:
        """Return the diagonal of the Hessian, ``[N, K]``."""
        return torch.full_like(self._values, 2 * self.share, dtype=torch.float64)

    def drawn_gradient(self, numbers: SampleStreams) -> Tensor:
        """Return the gradient for a label of each output."""
        noise = torch.special.ndtri(numbers.uniforms(self._places))
        return (-2 * self.share * noise).float().view(self.outputs.shape)
