"""laplace-torch: exact curvature backends for diagonal Laplace approximations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.statistics.gauss_newton import gauss_newton_diagonal
from fisherprune.statistics.moments import gradient_moments

try:
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
except ImportError as error:
    raise FisherpruneError(
        f"fisherprune.integrations.laplace: laplace-torch must load, but {error}; "
        "pip install 'fisherprune[laplace]'"
    ) from error


class FisherEF(EFInterface):
    r"""Diagonal of the empirical Fisher information, by ``gradient_moments``.

    .. math:: f \sum_n g_n \odot g_n

    over the samples of a batch, :math:`g_n` the gradient of the sample's
    cross-entropy, or sum of squared errors, and f 1 or, for squared errors, 0.5: the
    number that laplace-torch's own EF backends compute, for any model, without a
    gradient of each sample in memory. Positions of one sample (``[N, T, C]``) add up
    before the square. Frozen parameters are left out; last layers and subnetworks are
    taken; models whose input is a mapping too.

    Example:
        >>> from laplace import Laplace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        >>> data = torch.utils.data.TensorDataset(
        ...     torch.randn(16, 4), torch.randint(3, (16,))
        ... )
        >>> la = Laplace(net, "classification", "all", "diag", backend=FisherEF)
        >>> la.fit(torch.utils.data.DataLoader(data, batch_size=8))
        >>> la.posterior_variance.shape
        torch.Size([83])
    """

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch and the diagonal.

        Args:
            x: inputs, a tensor or a mapping.
            y: labels, ``[N]`` or ``[N, T]``, or targets of the outputs' shape.
            kwargs: not read; fit gives the number of all samples.

        Returns:
            Times f, the loss summed up over the samples, and ``[parameters]``.

        Raises:
            FisherpruneError: for any reason of ``gradient_moments``.
        """
        x = dict(x) if isinstance(x, Mapping) else x

        def losses(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
            return self._losses(model(batch[0]), batch[1])

        found = gradient_moments(
            self.model, [(x, y)], losses=losses, parameters=self.params_dict
        )
        squares = {n: square * found.groups for n, square in found.fisher.items()}
        with torch.no_grad():
            loss = self._losses(self.model(x), y).sum()
        return self.factor * loss, self.factor * _vector(self, squares)

    def _losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample."""
        if self.likelihood == "regression":
            return (outputs - y).square().flatten(1).sum(1)
        flat = outputs.flatten(0, -2), y.flatten()
        return F.cross_entropy(*flat, reduction="none").view(len(outputs), -1).sum(1)

    def kron(self, *args: Any, **kwargs: Any) -> Any:
        """Raise FisherpruneError: there are no Kronecker factors here."""
        raise _not_diagonal(self)


class FisherGGN(GGNInterface):
    """Diagonal of the generalized Gauss-Newton matrix, by ``gauss_newton_diagonal``.

    The number that laplace-torch computes from the Jacobians of all outputs, without
    these in memory: as many backward passes as outputs. ``stochastic=True`` and models
    whose input is a mapping go laplace-torch's own way.
    """

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch and the diagonal; as in ``FisherEF.diag``.

        Raises:
            FisherpruneError: for any reason of ``gauss_newton_diagonal``.
        """
        if self.stochastic or isinstance(x, Mapping):
            return super().diag(x, y, **kwargs)
        found = gauss_newton_diagonal(
            self.model, [(x, y)], self.lossfunc, parameters=self.params_dict
        )
        sums = {n: mean * len(y) for n, mean in found.items()}
        with torch.no_grad():
            loss = self.lossfunc(self.model(x), y)
        return self.factor * loss, self.factor * _vector(self, sums)

    def kron(self, *args: Any, **kwargs: Any) -> Any:
        """Raise FisherpruneError: there are no Kronecker factors here."""
        raise _not_diagonal(self)


def _vector(backend: CurvatureInterface, named: Mapping[str, Tensor]) -> Tensor:
    """Return the values as laplace-torch orders them, of the subnetwork if any."""
    parts = [named[n].flatten().to(p.dtype) for n, p in backend.params_dict.items()]
    vector = torch.cat(parts)
    chosen = backend.subnetwork_indices
    return vector if chosen is None else vector[chosen]


def _not_diagonal(backend: CurvatureInterface) -> FieldError:
    where = f"{type(backend).__name__}: hessian_structure"
    wanted = "'diag' (or 'full', laplace-torch's own way)"
    return FieldError(where, wanted, "'kron'; its CurvlinopsGGN has that one")
