"""Attention of ``nn.MultiheadAttention``."""

from __future__ import annotations

from types import FunctionType

import torch.nn.functional as F

from fisherprune.persample.registry import register_rewrite

_attention = F.multi_head_attention_forward
# As PyTorch wrote it, but without handing itself over: so its own calls are seen.
register_rewrite(_attention)(
    FunctionType(
        _attention.__code__,
        {**_attention.__globals__, "has_torch_function": lambda tensors: False},
        _attention.__name__,
        _attention.__defaults__,
        _attention.__closure__,
    )
)
