"""Execution of masked models without the weights that are pruned.

``compress`` replaces layers by ones that hold the kept weights alone and run on kernels
whose price is that of the kept weights; ``decompress`` is the way back, ``save`` and
``load`` are files of the kept weights and their places. What lies between the layers,
BatchNorm, ReLU, additions and pooling, runs at the speed of memory. ``shrink`` makes
smaller dense models where whole channels are pruned, ``semi_structured`` runs 2:4
weights on GPUs.
"""

from fisherprune.sparse.compress import compress, decompress, hold_dense
from fisherprune.sparse.convolve import Conv2d
from fisherprune.sparse.cost import expected_speedup
from fisherprune.sparse.fuse import fuse_relu, unfuse
from fisherprune.sparse.layers import SparseConv1d, SparseConv2d, SparseLinear
from fisherprune.sparse.normalize import BatchNorm
from fisherprune.sparse.optimizers import check_optimizer
from fisherprune.sparse.pool import MaxPool2d
from fisherprune.sparse.replace import replaced, restored
from fisherprune.sparse.saving import load, save
from fisherprune.sparse.semi_structured import semi_structured
from fisherprune.sparse.shrink import shrink

__all__ = [
    "BatchNorm",
    "Conv2d",
    "MaxPool2d",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "check_optimizer",
    "compress",
    "decompress",
    "expected_speedup",
    "fuse_relu",
    "hold_dense",
    "load",
    "replaced",
    "restored",
    "save",
    "semi_structured",
    "shrink",
    "unfuse",
]
