"""Named layer shapes for the tests of grad_moments, plain data for every device.

A case is the keyword arguments of `make`: a convolution where ``size`` is given, a
linear layer where ``positions`` is (its shape between samples and features, may be ()).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import pad

CASES: dict[str, dict] = {
    # convolutions
    "plain_3x3": dict(n=3, c=4, o=8, size=(6, 5), kernel=(3, 3), padding=(1, 1)),
    "first_layer": dict(n=3, c=3, o=64, size=(9, 9), kernel=(3, 3), padding=(1, 1)),
    "many_outputs": dict(n=2, c=5, o=130, size=(5, 5), kernel=(3, 3), padding=(1, 1)),
    "many_channels": dict(n=2, c=70, o=12, size=(4, 4), kernel=(3, 3), padding=(1, 1)),
    "odd_channels": dict(n=4, c=17, o=3, size=(5, 7), kernel=(2, 3), padding=(1, 0)),
    "one_channel": dict(n=3, c=1, o=1, size=(5, 5), kernel=(3, 3)),
    "no_padding": dict(n=2, c=3, o=17, size=(7, 6), kernel=(3, 2)),
    "wide_padding": dict(n=2, c=2, o=5, size=(3, 4), kernel=(3, 3), padding=(3, 2)),
    "stride_2": dict(
        n=3, c=6, o=20, size=(9, 8), kernel=(3, 3), stride=(2, 2), padding=(1, 1)
    ),
    "stride_3_1": dict(n=2, c=3, o=9, size=(11, 6), kernel=(3, 3), stride=(3, 1)),
    "dilation": dict(
        n=2, c=3, o=7, size=(9, 10), kernel=(3, 3), padding=(2, 1), dilation=(2, 3)
    ),
    "everything_uneven": dict(
        n=5,
        c=6,
        o=10,
        size=(13, 9),
        kernel=(3, 2),
        stride=(2, 3),
        padding=(2, 1),
        dilation=(3, 2),
        groups=2,
        group_size=2,
    ),
    "pointwise": dict(n=3, c=19, o=33, size=(4, 5), kernel=(1, 1)),
    "pointwise_stride_2": dict(
        n=3, c=10, o=18, size=(7, 8), kernel=(1, 1), stride=(2, 2)
    ),
    "pointwise_padded": dict(n=2, c=3, o=4, size=(3, 3), kernel=(1, 1), padding=(1, 2)),
    "rows_1x7": dict(n=2, c=2, o=6, size=(3, 12), kernel=(1, 7), padding=(0, 3)),
    "large_kernel": dict(n=2, c=3, o=6, size=(12, 12), kernel=(7, 7), stride=(2, 2)),
    # wide enough for Winograd's way on the CPU
    "wide_3x3": dict(n=3, c=50, o=66, size=(9, 10), kernel=(3, 3), padding=(1, 1)),
    "wide_3x3_no_padding": dict(n=2, c=64, o=49, size=(11, 9), kernel=(3, 3)),
    "wide_3x3_padding": dict(
        n=2, c=49, o=64, size=(6, 9), kernel=(3, 3), padding=(3, 2)
    ),
    "wide_3x3_groups": dict(
        n=7, c=51, o=50, size=(8, 8), kernel=(3, 3), padding=(1, 1), group_size=3
    ),
    "wide_3x3_large_image": dict(
        n=3, c=49, o=49, size=(31, 41), kernel=(3, 3), padding=(1, 1), group_size=2
    ),
    "wide_3x3_long_rows": dict(
        n=1, c=49, o=49, size=(7, 139), kernel=(3, 3), padding=(0, 1)
    ),
    "one_position": dict(n=5, c=6, o=40, size=(3, 3), kernel=(3, 3)),
    "few_positions": dict(n=6, c=9, o=65, size=(2, 2), kernel=(3, 3), padding=(1, 1)),
    "short_groups": dict(
        n=151,
        c=5,
        o=49,
        size=(2, 2),
        kernel=(3, 3),
        padding=(1, 1),
        group_size=2,
    ),
    "one_sample": dict(n=1, c=5, o=6, size=(5, 5), kernel=(3, 3), padding=(1, 1)),
    "zero_samples": dict(n=0, c=3, o=4, size=(5, 5), kernel=(3, 3)),
    "zero_positions": dict(n=3, c=3, o=4, size=(2, 2), kernel=(3, 3)),
    "zero_outputs": dict(n=2, c=3, o=0, size=(4, 4), kernel=(3, 3)),
    "zero_channels": dict(n=2, c=0, o=3, size=(4, 4), kernel=(3, 3)),
    "grouped": dict(
        n=3, c=12, o=15, size=(6, 6), kernel=(3, 3), padding=(1, 1), groups=3
    ),
    "grouped_wide": dict(
        n=2, c=34, o=72, size=(5, 5), kernel=(3, 3), padding=(1, 1), groups=2
    ),
    "depthwise": dict(
        n=3, c=37, o=37, size=(6, 7), kernel=(3, 3), padding=(1, 1), groups=37
    ),
    "depthwise_stride_2": dict(
        n=2,
        c=18,
        o=18,
        size=(7, 7),
        kernel=(3, 3),
        stride=(2, 2),
        padding=(1, 1),
        groups=18,
        group_size=2,
    ),
    "depthwise_multiplier": dict(
        n=3, c=9, o=18, size=(5, 5), kernel=(3, 3), padding=(1, 1), groups=9
    ),
    "groups_reduce": dict(
        n=2, c=20, o=10, size=(5, 5), kernel=(3, 3), padding=(1, 1), groups=10
    ),
    # groups of few channels, whose positions fill vectors on the CPU
    "depthwise_rows": dict(
        n=3, c=7, o=7, size=(9, 11), kernel=(3, 3), padding=(1, 1), groups=7
    ),
    "depthwise_3x3_stride_2": dict(
        n=5,
        c=21,
        o=21,
        size=(19, 47),
        kernel=(3, 3),
        stride=(2, 2),
        padding=(1, 1),
        groups=21,
        group_size=2,
    ),
    "depthwise_5x5": dict(
        n=2, c=16, o=16, size=(14, 14), kernel=(5, 5), padding=(2, 2), groups=16
    ),
    "depthwise_7x7": dict(
        n=2, c=17, o=17, size=(7, 7), kernel=(7, 7), padding=(3, 3), groups=17
    ),
    "depthwise_9x8": dict(
        n=2, c=18, o=18, size=(16, 19), kernel=(9, 8), padding=(1, 9), groups=18
    ),
    "depthwise_dilated": dict(
        n=4,
        c=16,
        o=16,
        size=(17, 23),
        kernel=(3, 2),
        stride=(1, 3),
        padding=(3, 5),
        dilation=(2, 2),
        groups=16,
        group_size=3,
    ),
    "depthwise_padding_beyond_image": dict(
        n=2, c=17, o=17, size=(3, 4), kernel=(3, 3), padding=(6, 5), groups=17
    ),
    "depthwise_many_channels": dict(
        n=2, c=50, o=50, size=(9, 9), kernel=(3, 3), padding=(1, 1), groups=50
    ),
    "depthwise_wide_multiplier": dict(
        n=2, c=5, o=35, size=(8, 9), kernel=(3, 3), padding=(1, 1), groups=5
    ),
    "depthwise_large_image": dict(
        n=2,
        c=3,
        o=3,
        size=(213, 185),
        kernel=(3, 3),
        stride=(2, 1),
        padding=(1, 1),
        groups=3,
        group_size=2,
    ),
    "depthwise_row": dict(
        n=3, c=4, o=4, size=(100, 1), kernel=(5, 1), padding=(2, 0), groups=4
    ),
    "grouped_by_4": dict(
        n=3, c=32, o=32, size=(8, 9), kernel=(3, 3), padding=(1, 1), groups=8
    ),
    "grouped_by_8_stride_2": dict(
        n=3,
        c=32,
        o=28,
        size=(19, 17),
        kernel=(3, 3),
        stride=(2, 2),
        padding=(1, 1),
        groups=4,
        group_size=2,
    ),
    "grouped_pointwise": dict(n=2, c=24, o=36, size=(9, 8), kernel=(1, 1), groups=6),
    # groups of samples
    "group_of_2": dict(
        n=6, c=4, o=9, size=(5, 5), kernel=(3, 3), padding=(1, 1), group_size=2
    ),
    "group_remainder": dict(
        n=7, c=4, o=9, size=(5, 5), kernel=(3, 3), padding=(1, 1), group_size=3
    ),
    "group_of_all": dict(
        n=5, c=4, o=9, size=(5, 5), kernel=(3, 3), padding=(1, 1), group_size=5
    ),
    "group_beyond_all": dict(
        n=5, c=4, o=9, size=(5, 5), kernel=(3, 3), padding=(1, 1), group_size=64
    ),
    "group_one_position": dict(
        n=7, c=8, o=33, size=(3, 3), kernel=(3, 3), group_size=4
    ),
    # large enough for several blocks of samples, with groups that straddle them
    "many_samples": dict(
        n=65, c=8, o=66, size=(12, 12), kernel=(3, 3), padding=(1, 1), group_size=9
    ),
    "large_group": dict(
        n=60, c=3, o=65, size=(24, 24), kernel=(3, 3), padding=(1, 1), group_size=59
    ),
    "large_image": dict(n=2, c=2, o=9, size=(191, 191), kernel=(2, 2)),
    "large_image_group": dict(
        n=3, c=1, o=9, size=(370, 190), kernel=(3, 3), stride=(2, 1), group_size=2
    ),
    "many_samples_few_positions": dict(
        n=600, c=7, o=20, size=(2, 2), kernel=(3, 3), padding=(1, 1)
    ),
    "pointwise_of_one_pixel": dict(
        n=9, c=1030, o=516, size=(1, 1), kernel=(1, 1), groups=2
    ),
    # linear layers
    "linear": dict(n=9, c=21, o=37, positions=()),
    "linear_one": dict(n=1, c=1, o=1, positions=()),
    "linear_wide": dict(n=300, c=130, o=70, positions=()),
    "linear_groups": dict(n=11, c=20, o=17, positions=(), group_size=4),
    "linear_group_of_all": dict(n=11, c=20, o=17, positions=(), group_size=11),
    "linear_positions": dict(n=4, c=10, o=19, positions=(7,)),
    "linear_positions_2d": dict(n=3, c=10, o=6, positions=(3, 4), group_size=2),
    "linear_large": dict(n=23, c=512, o=520, positions=()),
    "linear_large_few_samples": dict(n=3, c=512, o=520, positions=()),
    "linear_large_groups": dict(n=5, c=512, o=520, positions=(), group_size=2),
    "linear_many_outputs": dict(n=13, c=65, o=1003, positions=()),
    "linear_many_samples": dict(n=1100, c=40, o=50, positions=()),
    "linear_2_positions": dict(n=37, c=67, o=101, positions=(2,)),
    "linear_4_positions_groups": dict(n=23, c=33, o=50, positions=(4,), group_size=3),
    "linear_blocks_of_groups": dict(n=700, c=17, o=9, positions=(3,), group_size=5),
    "linear_many_positions": dict(n=3, c=35, o=49, positions=(197,)),
    "pointwise_wide": dict(n=5, c=70, o=52, size=(3, 5), kernel=(1, 1)),
    "pointwise_wide_stride_2": dict(
        n=4, c=34, o=50, size=(9, 7), kernel=(1, 1), stride=(2, 2), group_size=3
    ),
    "linear_zero_positions": dict(n=3, c=10, o=6, positions=(0,)),
    "linear_zero_samples": dict(n=0, c=10, o=6, positions=()),
}
"""The shapes on which every device's kernel is compared with the float64 reference."""

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "samples_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "padded_rows": lambda x: pad(x, (0, 3))[..., :-3],
    "odd_start": lambda x: pad(x, (1, 0))[..., 1:],
    "unaligned": lambda x: pad(x.flatten(), (1, 0))[1:].view(x.shape),
}
"""Ways to store a [N, C, H, W] tensor of the same values, on the device it is on."""

STORED = (
    "plain_3x3",
    "wide_3x3",
    "pointwise",
    "pointwise_wide_stride_2",
    "grouped",
    "grouped_by_4",
    "grouped_by_8_stride_2",
    "depthwise_3x3_stride_2",
    "depthwise_dilated",
    "everything_uneven",
)
"""The convolutions that are tried in every layout."""


def vectors_that_end_within_a_row(device: str = "cpu") -> Iterator[tuple]:
    """Yield cases whose rows are aligned, but of no multiple of four positions."""
    random = torch.Generator().manual_seed(0)
    input = torch.randn(3, 5, 1, 24, generator=random).to(device)
    grad = torch.randn(3, 7, 1, 24, generator=random).to(device)
    for positions in (9, 15, 17, 22, 23):
        pair = input[..., :positions], grad[..., :positions]
        yield (*pair, torch.Size((7, 5, 1, 1)), {})


def expanded(device: str = "cpu") -> tuple:
    """Return a case with strides of 0: the gradient of a sum, one image for all."""
    input, grad, weight, options = make(**CASES["plain_3x3"])
    one = torch.full((1, 1, 1, 1), 0.3, device=device).expand(grad.shape)
    return input[:1].to(device).expand(input.shape), one, weight, options


def _conv_extent(size: int, kernel: int, stride: int, padding: int, dilation: int):
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    return 0 if span < 0 else span // stride + 1


def make(
    *,
    n: int,
    c: int,
    o: int,
    size: tuple[int, int] | None = None,
    positions: tuple[int, ...] | None = None,
    kernel: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    group_size: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Size, dict]:
    """Return input and grad (seeded, on the CPU), the weight's shape, op arguments."""
    random = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    if size is None:
        weight = torch.Size((o, c))
        return (
            randn(n, *positions, c),
            randn(n, *positions, o),
            weight,
            dict(group_size=group_size),
        )
    out = [
        _conv_extent(*each)
        for each in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    weight = torch.Size((o, c // groups, *kernel))
    options = dict(
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        group_size=group_size,
    )
    return randn(n, c, *size), randn(n, o, *out), weight, options


def accumulators(weight: torch.Size, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Return a sum and a sum_sq that already hold something, since the op adds."""
    random = torch.Generator().manual_seed(seed)
    first = torch.randn(weight, generator=random)
    return first, torch.rand(weight, generator=random)
