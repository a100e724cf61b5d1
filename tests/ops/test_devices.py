"""Tensors of several devices in one call are refused, on whichever device it runs."""

import pytest
import torch


@pytest.mark.parametrize("name", ["input", "grad", "sum", "sum_sq"])
def test_moments_of_several_devices(name):
    tensors = {
        "input": torch.randn(2, 3, 4, 4),
        "grad": torch.randn(2, 5, 4, 4),
        "sum": torch.zeros(5, 3, 1, 1),
        "sum_sq": torch.zeros(5, 3, 1, 1),
    }
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(RuntimeError, match="must be on the device of input, .*, got"):
        torch.ops.fisherprune.grad_moments(
            *tensors.values(), [1, 1], [0, 0], [1, 1], 1, 1
        )


def test_scores_of_several_devices():
    scores = [torch.randn(3), torch.randn(3, device="meta")]
    op = torch.ops.fisherprune
    for call in (
        lambda: op.global_topk(scores, [2]),
        lambda: op.topk_histogram(scores, 0, 0, 8),
        lambda: op.topk_masks(scores, 0.0, [1, 1]),
    ):
        with pytest.raises(RuntimeError, match=r"scores\[1\] must be on cpu like"):
            call()
