"""What grad_moments refuses, and says of it."""

import pytest
import torch
from moment_checks import negated


def test_rows_that_32_bits_cannot_count_are_refused():
    row = torch.ones(1).expand(1, 1, 1, 2**31)
    arguments = VALID | dict(input=row, grad=row)
    arguments |= {name: zeros(1, 1, 1, 1) for name in ("sum", "sum_sq")}
    message = f"at most {2**31 - 1} values a channel, got {2**31}"
    with pytest.raises(RuntimeError, match=f"grad_moments: the input .* {message}"):
        torch.ops.fisherprune.grad_moments(*arguments.values())


@pytest.mark.parametrize("name", ["sum", "sum_sq"])
def test_lazily_negated_accumulators_are_refused(name):
    arguments = VALID | {name: negated(VALID[name])}
    with pytest.raises(RuntimeError) as caught:
        torch.ops.fisherprune.grad_moments(*arguments.values())
    assert str(caught.value) == (
        f"grad_moments: {name} must be a tensor of its own, got a lazily negated view "
        "of another one"
    )


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


VALID = dict(
    input=zeros(2, 4, 5, 5),
    grad=zeros(2, 6, 3, 3),
    sum=zeros(6, 4, 3, 3),
    sum_sq=zeros(6, 4, 3, 3),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    group_size=1,
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            dict(input=zeros(2, 4, 5)),
            "input must have shape [N, C, H, W], got [2, 4, 5",
        ),
        (dict(grad=zeros(2, 6)), "grad must have shape [N, O, P, Q], got [2, 6]"),
        (
            dict(input=zeros(2, 4, 5, 5).double()),
            "input must be float32, float16 or bfloat16, got Double",
        ),
        (
            dict(grad=zeros(2, 6, 3, 3).int()),
            "grad must be float32, float16 or bfloat16, got Int",
        ),
        (dict(stride=(0, 1)), "stride must be two integers of at least 1"),
        (dict(stride=(1,)), "stride must be two integers of at least 1"),
        (dict(padding=(0, -1)), "padding must be two integers of at least 0"),
        (dict(dilation=(0, 0)), "dilation must be two integers of at least 1"),
        (
            dict(dilation=(1, 2**61)),
            f"dilation * (kernel - 1) must be at most {2**60}, got {2**61} * 2",
        ),
        (
            dict(padding=(2**62, 0)),
            f"padding must leave at most {2**60} rows and columns of the padded input, "
            f"got {2**62} on both sides of 5",
        ),
        (
            dict(sum=zeros(6, 4)),
            "sum must have shape [O, C / groups, Y, X], got [6, 4]",
        ),
        (dict(group_size=0), "group_size must be at least 1, got 0"),
        (
            dict(groups=3),
            "groups must divide the channels of input and grad, got groups 3 "
            "for 4 and 6",
        ),
        (dict(groups=0), "groups must divide the channels"),
        (
            dict(grad=zeros(3, 6, 3, 3)),
            "grad must have as many samples as input, 2, got 3",
        ),
        (
            dict(grad=zeros(2, 6, 3, 4)),
            "grad must have shape [2, O, 3, 3] for this input and kernel, got "
            "[2, 6, 3, 4]",
        ),
        (
            dict(sum=zeros(6, 5, 3, 3)),
            "sum must have shape [6, 4, 3, 3], got [6, 5, 3, 3]",
        ),
        (
            dict(sum_sq=zeros(6, 4, 3, 1)),
            "sum_sq must have shape [6, 4, 3, 3], got [6, 4, 3, 1]",
        ),
        (
            dict(sum=zeros(6, 4, 3, 3).double()),
            "sum must be a contiguous float32 tensor",
        ),
        (
            dict(sum_sq=zeros(6, 4, 3, 3).mT),
            "sum_sq must be a contiguous float32 tensor",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(wrong, message):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.fisherprune.grad_moments(*(VALID | wrong).values())
    assert str(caught.value).startswith("grad_moments: " + message)


@pytest.mark.parametrize("name", ["sum", "sum_sq"])
@pytest.mark.parametrize("other", ["input", "grad"])
def test_accumulators_that_share_memory_are_refused(name, other):
    memory = torch.zeros(1000)
    shared = memory[: VALID[other].numel()].view_as(VALID[other])
    last = VALID[other].numel() - 1
    accumulator = memory[last : last + VALID[name].numel()].view_as(VALID[name])
    arguments = VALID | {name: accumulator, other: shared}
    with pytest.raises(
        RuntimeError, match=f"{name} must not share memory with {other}"
    ):
        torch.ops.fisherprune.grad_moments(*arguments.values())


def test_accumulators_that_share_memory_with_each_other_are_refused():
    arguments = VALID | dict(sum_sq=VALID["sum"])
    with pytest.raises(RuntimeError, match="sum must not share memory with sum_sq"):
        torch.ops.fisherprune.grad_moments(*arguments.values())


def test_neighbours_in_memory_are_accepted():
    sum, sum_sq = torch.zeros(2, 6, 4, 3, 3)
    torch.ops.fisherprune.grad_moments(*(VALID | dict(sum=sum, sum_sq=sum_sq)).values())
