"""Execution of masked models without the weights that are pruned.

``compress`` replaces layers by ones that hold the kept weights alone and run on kernels
whose price is that of the kept weights; ``decompress`` is the way back, ``save`` and
``load`` are files of the kept weights and their places.
"""

from fisherprune.sparse.compress import compress, decompress, hold_dense
from fisherprune.sparse.layers import SparseConv1d, SparseConv2d, SparseLinear
from fisherprune.sparse.optimizers import check_optimizer
from fisherprune.sparse.saving import load, save

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "check_optimizer",
    "compress",
    "decompress",
    "hold_dense",
    "load",
    "save",
]
