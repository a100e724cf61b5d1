"""Devices of tests that need a GPU; on the CPU the same tests show that they test."""

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=needs_gpu),
    pytest.param("cuda:1", marks=needs_two_gpus),  # another one is the current device
]

CYCLES = 10**8
"""Of a GPU that sleeps: a twentieth of a second, in which the host goes on."""
