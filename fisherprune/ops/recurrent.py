"""The steps of an LSTM on the CPU, and backward: the wrappers' half.

Kernels are in ``csrc/lstm``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherprune.ops import kernels as kernels  # registers the ops


def lstm(
    ih: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Take all steps of one layer and direction.

    With the sigmoid :math:`s`, for sample n and step t::

        i, f, g, o = s, s, tanh, s of (ih[n, t] + weight h[n, t - 1] + bias)
        c[n, t] = f * c[n, t - 1] + i * g
        h[n, t] = o * tanh(c[n, t])

    Deterministic bit for bit, whatever the number of threads and the other samples.
    There are no gradients: they are what ``lstm_backward`` is for.

    Args:
        ih: products of the inputs, ``[N, T, 4 * H]``; all tensors are contiguous
            float32 on the CPU.
        h0: the first hidden states, ``[N, H]``.
        c0: the first cell states, ``[N, H]``.
        weight: of the hidden states, ``[4 * H, H]``.
        bias: ``[4 * H]``, or None for 0.

    Returns:
        h and c, ``[N, T + 1, H]`` with the first ones in front; i, f, g and o,
        ``[N, T, 4 * H]``; and ``tanh(c)``, ``[N, T, H]``.

    Raises:
        RuntimeError: on other shapes, dtypes or devices.
    """
    return torch.ops.fisherprune.lstm(ih, h0, c0, weight, bias)


def lstm_backward(
    grad: Tensor,
    last: Tensor,
    weight: Tensor,
    cells: Tensor,
    gates: Tensor,
    tanh: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``ih``, ``h0`` and ``c0`` of ``lstm``.

    Args:
        grad: of all h but the first, ``[N, T, H]``; all tensors are contiguous float32
            on the CPU.
        last: gradient of the last c, ``[N, H]``.
        weight: of the hidden states, ``[4 * H, H]``.
        cells: from ``lstm``.
        gates: from ``lstm``.
        tanh: from ``lstm``.

    Raises:
        RuntimeError: on other shapes, dtypes or devices.
    """
    return torch.ops.fisherprune.lstm_backward(grad, last, weight, cells, gates, tanh)


@torch.library.register_fake("fisherprune::lstm")
def _(
    ih: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples, steps, width = len(ih), ih.shape[1], weight.shape[1]
    states = samples, steps + 1, width
    return (
        ih.new_empty(states),
        ih.new_empty(states),
        ih.new_empty(ih.shape),
        ih.new_empty((samples, steps, width)),
    )


@torch.library.register_fake("fisherprune::lstm_backward")
def _(
    grad: Tensor,
    last: Tensor,
    weight: Tensor,
    cells: Tensor,
    gates: Tensor,
    tanh: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    state = last.shape
    return gates.new_empty(gates.shape), grad.new_empty(state), grad.new_empty(state)
