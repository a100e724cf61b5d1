"""Batch normalization as a module whose training mode is one fused op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fisherprune import ops


class BatchNorm(_BatchNorm):
    r"""Batch normalization of ``[N, C, *]``, with residual and ReLU in the same pass.

    ``forward(x, residual)`` returns
    ``relu?((x - mean) / sqrt(variance + eps) * weight + bias + residual)``. In training
    mode mean and variance are the batch's, by ``fisherprune.ops.batch_norm``; running
    statistics are updated as those of ``torch.nn.BatchNorm2d``. In evaluation mode they
    are the running ones. The result has the layout of ``x``. Where the op has no kernel
    for a dtype (it has float32 and bfloat16, with float32 parameters), PyTorch's own
    normalization does the work.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: share of the batch in the running statistics; None: all batches count
            alike.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics; without them
            evaluation normalizes by the batch, too.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        relu: whether negative outputs become 0.
        others: what PyTorch's own modules take besides, such as ``bias`` in newer ones.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).

    Example:
        >>> import torch
        >>> norm = BatchNorm(3, relu=True)
        >>> x = torch.randn(8, 3, 4, 4)
        >>> norm(x, residual=x).min()
        tensor(0., grad_fn=<MinBackward1>)
    """

    kind: type[_BatchNorm] | None = None
    """The module of ``torch.nn`` whose place this one has."""
    relu: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        relu: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            **others,
        )
        self.relu = relu

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool | None = None
    ) -> Tensor:
        """Normalize, add, cut off.

        Args:
            x: ``[N, C, *]``.
            residual: what is added, or None; PyTorch's rules of broadcasting and of
                dtypes hold.
            relu: in place of the module's own ``relu``.

        Raises:
            ValueError: where ``x`` has not the axes of the module whose place this one
                has, or in training mode one value per channel.
        """
        self._check_input_dim(x)
        relu = self.relu if relu is None else relu
        by_batch = self.training or self.running_mean is None
        if by_batch and self._has_kernel(x):
            _check_values(x)
            if residual is None or _alike(x, residual):
                return self._by_op(x, residual, relu)
            y = self._by_op(x, None, False)
        elif not by_batch and self._running()[0].dtype == x.dtype:
            y = self._by_running(x)
        else:
            y = super().forward(x)
        if residual is not None:
            y = y + residual
        return y.relu() if relu else y

    def extra_repr(self) -> str:
        """Return the arguments."""
        return super().extra_repr() + (", relu=True" if self.relu else "")

    def _check_input_dim(self, input: Tensor) -> None:
        if self.kind is not None:
            self.kind._check_input_dim(self, input)
        elif input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _has_kernel(self, x: Tensor) -> bool:
        own = (self.weight, self.bias, self.running_mean)
        return (
            x.dtype in (torch.float32, torch.bfloat16)
            and x.numel() > 0
            and all(t is None or t.dtype == torch.float32 for t in own)
        )

    def _by_op(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        y, mean, scale = ops.batch_norm(
            x, residual, self.weight, self.bias, eps=self.eps, relu=relu
        )
        if self.training and self.track_running_stats:
            self._update(mean, scale, x.numel() // x.shape[1])
        return y

    @torch.no_grad()
    def _update(self, mean: Tensor, scale: Tensor, count: int) -> None:
        """Move the running statistics towards the batch's, the variance unbiased."""
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:
                share = 1 / float(self.num_batches_tracked)
        variance = (scale.double() ** -2 - self.eps).clamp_(min=0)
        variance *= count / (count - 1)
        for running, own in ((self.running_mean, mean), (self.running_var, variance)):
            if running is not None:
                running.mul_(1 - (share or 0)).add_(own, alpha=share or 0)

    def _running(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None and self.running_var is not None
        return self.running_mean, self.running_var

    def _by_running(self, x: Tensor) -> Tensor:
        """Return x * a + b: PyTorch's own kernel loses the layout."""
        mean, variance = self._running()
        a = (variance + self.eps).rsqrt()
        if self.weight is not None:
            a = a * self.weight
        b = -mean * a
        if self.bias is not None:
            b = b + self.bias
        shape = (-1, *(1 for _ in x.shape[2:]))
        return torch.addcmul(b.view(shape), x, a.view(shape))


def _alike(x: Tensor, residual: Tensor) -> bool:
    return x.shape == residual.shape and x.dtype == residual.dtype


def _check_values(x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{x.size()}"
        )
