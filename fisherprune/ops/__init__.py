"""The ops and their steps; ``reference`` has a pure-PyTorch twin of each."""

from fisherprune.ops.affine import channel_affine_backward
from fisherprune.ops.normalize import batch_norm, batch_norm_backward
from fisherprune.ops.pooling import MOST_PLACES, max_pool2d
from fisherprune.ops.products import linear
from fisherprune.ops.recurrent import lstm, lstm_backward
from fisherprune.ops.rows import row_moments
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
    "MOST_PLACES",
    "batch_norm",
    "batch_norm_backward",
    "channel_affine_backward",
    "global_topk",
    "grad_moments",
    "key_value",
    "linear",
    "lstm",
    "lstm_backward",
    "max_pool2d",
    "refuse_nonfinite",
    "row_moments",
    "sparse_conv2d",
    "sparse_conv2d_input",
    "sparse_conv2d_weight",
    "topk_histogram",
    "topk_masks",
]
