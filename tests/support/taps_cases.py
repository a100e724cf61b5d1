"""Convolutions that the CUDA kernel of nine taps takes, by name.

Arguments of ``moment_cases.make``: every width, and bands of one, some and all stages
of an image, for values of 32 and of 16 bits.
"""


def _same(size, **shape) -> dict:
    """Return a 3 x 3 convolution that keeps the image's size."""
    shape = dict(c=16, o=64) | shape
    return dict(size=size, kernel=(3, 3), padding=(1, 1)) | shape


CASES: dict[str, dict] = {
    "4_wide": _same((4, 4), n=5, o=128),
    "4_wide_one_sample": _same((4, 4), n=1, c=32),
    "4_wide_group_remainder": _same((4, 4), n=11, group_size=3),
    "4_wide_flushed_twice": _same((4, 4), n=530),
    "8_wide": _same((8, 8), n=3, c=32, o=128),
    "8_wide_three_stages": _same((24, 8), n=4),
    "8_wide_group_remainder": _same((8, 8), n=5, group_size=2),
    "8_wide_flushed_twice": _same((8, 8), n=262),
    "16_wide": _same((16, 16), n=3, o=128),
    "16_wide_short": _same((4, 16), n=6),
    "16_wide_ten_stages": _same((20, 16), n=2, c=32),
    "32_wide": _same((8, 32), n=3, o=128),
    "32_wide_two_bands": _same((16, 32), n=2),
    "32_wide_short": _same((2, 32), n=5, group_size=9),
    "grouped_by_taps": _same((8, 8), n=3, c=48, o=192, groups=3),
}

WARPGROUPS: dict[str, dict] = {
    **{name: shape for name, shape in CASES.items() if name != "32_wide_short"},
    # tiles that are not full
    "odd_outputs": _same((8, 8), n=3, o=131),
    "odd_channels": _same((16, 16), n=3, c=37),
    "one_of_each": _same((4, 4), n=2, c=1, o=1),
    "odd_groups": _same((4, 4), n=3, c=51, o=45, groups=3),
    "odd_group_remainder": _same((4, 32), n=7, c=19, o=70, group_size=3),
    # blocks of a cluster
    "four_blocks_share": _same((4, 4), n=3, c=64, o=130),
    "four_blocks_share_longer": _same((8, 8), n=9, c=61, o=40, group_size=2),
    "two_blocks_share": _same((4, 32), n=8, c=35, o=64),
}
"""Those that the kernel of products of warpgroups takes."""
