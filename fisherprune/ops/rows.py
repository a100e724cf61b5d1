"""First and second moments of rows, on the CPU: the wrapper's half.

The kernel is in ``csrc/row_moments``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherprune.ops import kernels as kernels  # registers the op


def row_moments(rows: Tensor, group_size: int = 1) -> tuple[Tensor, Tensor]:
    r"""Return the sums over groups of the means of their rows, and of their squares.

    With :math:`m_j` the mean of the j-th ``group_size`` consecutive rows::

        sum    = sum_j m_j
        sum_sq = sum_j m_j * m_j

    Rows are read from memory once. Deterministic bit for bit, whatever the number of
    threads and the entries beside.

    Args:
        rows: float32 ``[N, P]`` on the CPU; the entries of a row lie side by side.
        group_size: of consecutive rows; it divides N.

    Returns:
        both sums, ``[P]``.

    Raises:
        RuntimeError: on other shapes, dtypes or devices.
    """
    return torch.ops.fisherprune.row_moments.default(rows, group_size)


@torch.library.register_fake("fisherprune::row_moments")
def _(rows: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[1]), rows.new_empty(rows.shape[1])
