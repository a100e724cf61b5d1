"""Execution of masked models without the weights that are pruned."""

from fisherprune.sparse.fuse import fuse_relu, unfuse
from fisherprune.sparse.normalize import BatchNorm
from fisherprune.sparse.pool import MaxPool2d
from fisherprune.sparse.replace import replaced, restored

__all__ = [
    "BatchNorm",
    "MaxPool2d",
    "fuse_relu",
    "replaced",
    "restored",
    "unfuse",
]
