"""The ops and their steps; ``reference`` has a pure-PyTorch twin of each."""

from fisherprune.ops.sparse import (
    sparse_conv2d,
    sparse_conv2d_input,
    sparse_conv2d_weight,
)
from fisherprune.ops.wrappers import (
    global_topk,
    grad_moments,
    key_value,
    refuse_nonfinite,
    topk_histogram,
    topk_masks,
)

__all__ = [
    "global_topk",
    "grad_moments",
    "key_value",
    "refuse_nonfinite",
    "sparse_conv2d",
    "sparse_conv2d_input",
    "sparse_conv2d_weight",
    "topk_histogram",
    "topk_masks",
]
