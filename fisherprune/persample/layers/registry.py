"""The layer functions whose per-sample gradients are known."""

from __future__ import annotations

import torch.nn.functional as F

from fisherprune.persample.layers import conv, linear, norm

CALLS = {
    F.conv1d: conv.conv1d,
    F.conv2d: conv.conv2d,
    F.linear: linear.linear,
    F.batch_norm: norm.batch_norm,
}
"""From a function to the one that sorts its arguments out, same signature."""
