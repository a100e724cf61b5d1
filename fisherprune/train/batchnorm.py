"""BatchNorm in training where ranks share a batch: by the statistics of all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode

from fisherprune.statistics.ranks import reaching

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class WholeBatchNorm(TorchFunctionMode):
    r"""A context in which ``F.batch_norm`` in training sees the shares of all ranks.

    With counts :math:`n_r`, means :math:`\mu_r` and variances :math:`v_r` of the shares
    and :math:`p_r = n_r / \sum_s n_s`:

    .. math:: \mu = \sum_r p_r \mu_r, \quad
        v = \sum_r p_r \left(v_r + (\mu_r - \mu)^2\right)

    added up in float64 in the order of the ranks, the same bits on each. Outputs,
    gradients and running statistics are those of one process up to rounding. It costs a
    message of three numbers a channel in the forward pass of each layer, and one of two
    in its backward pass.

    Args:
        group: of the ranks.
        counts: whether the share of this rank counts; its samples are normalized all
            the same.
    """

    def __init__(self, group: ProcessGroup, counts: bool) -> None:
        super().__init__()
        self.group, self.counts = group, counts

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Replace ``F.batch_norm``, leave the rest."""
        call = self.batch_norm if func is F.batch_norm else func
        return call(*args, **(kwargs or {}))

    @torch.compiler.disable
    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Do what ``F.batch_norm`` does, over the batch of all ranks."""
        running = running_mean, running_var
        if not training:
            return F.batch_norm(input, *running, weight, bias, False, momentum, eps)
        mean, var, count = self._statistics(input.detach())
        for known, new in zip(running, (mean, var * count / (count - 1)), strict=True):
            if known is not None:
                known.lerp_(new.to(known.dtype), momentum)
        whole = mean.to(self._dtype(input)), var.to(self._dtype(input)), count
        group = self.group, self.counts
        return _Normalize.apply(input, weight, bias, *whole, eps, *group)

    @staticmethod
    def _dtype(input: Tensor) -> torch.dtype:
        """Return the dtype of statistics."""
        low = input.dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if low else input.dtype

    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, biased variance and count of each channel, float64."""
        values = input.to(self._dtype(input))
        var, mean = torch.var_mean(values, _places(input), correction=0)
        count = input.numel() // input.shape[1] if self.counts else 0
        own = torch.stack([mean, var, torch.full_like(mean, count)])
        every = [torch.empty_like(own) for _ in range(self.group.size())]
        with reaching():
            distributed.all_gather(every, own, group=self.group)
        means, variances, counts = torch.stack(every, 1).double()
        total = counts.sum(0)
        parts = counts / total
        mean = (parts * means).sum(0)
        var = (parts * (variances + (means - mean).square())).sum(0)
        return mean, var, total


def _places(input: Tensor) -> list[int]:
    """Return the dimensions over which a channel has its statistics."""
    return [0, *range(2, input.dim())]


def _spread(channels: Tensor, like: Tensor) -> Tensor:
    """Return values of channels in the shape in which they meet an input of them."""
    return channels.view(1, -1, *(1 for _ in like.shape[2:]))


class _Normalize(torch.autograd.Function):
    r"""Normalization by mean and variance of all ranks, of which it is a function.

    With :math:`\hat x` the normalized input, :math:`\gamma` the weight and sums over
    the N values of a channel on all ranks:

    .. math:: dx = \frac{\gamma}{\sigma} \left(dy - \frac1N \sum dy
        - \hat x\, \frac1N \sum dy\, \hat x\right)
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: ProcessGroup,
        counts: bool,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, var, count)
        ctx.eps, ctx.group, ctx.counts = eps, group, counts
        return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        input, weight, mean, var, count = ctx.saved_tensors
        weight = torch.ones_like(mean) if weight is None else weight.detach()
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grads[0], input, weight, mean, var, None, None, False, ctx.eps, [True] * 3
        )
        sums = torch.stack([dweight, dbias])
        with reaching():
            distributed.all_reduce(sums, group=ctx.group)
        if ctx.counts:  # else neither mean nor variance depend on the input
            inverse = (var.double() + ctx.eps).rsqrt()
            slope, shift = (-weight * inverse / count * sums).to(mean.dtype)
            slope = slope * inverse.to(mean.dtype)
            dx += (input - _spread(mean, input)) * _spread(slope, input)
            dx += _spread(shift, input)
        dweight = dweight if ctx.needs_input_grad[1] else None
        dbias = dbias if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, *(None for _ in range(6))
