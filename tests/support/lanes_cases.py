"""Convolutions that the CUDA kernel takes whose lanes find their positions, by name.

Arguments of ``moment_cases.make``: widths that rows of 16 bytes do not fill, bands of
one, some and all rows of an image, tiles that are not full.
"""


def _bordered(size, **shape) -> dict:
    """Return a 3 x 3 convolution with a border of one."""
    shape = dict(c=16, o=64) | shape
    return dict(size=size, kernel=(3, 3), padding=(1, 1)) | shape


# Positions or channels lie side by side.
CASES: dict[str, dict] = {
    "7_lanes": _bordered((7, 7), n=3, c=32, o=128),
    "14_lanes": _bordered((14, 14), n=2, o=128),
    "28_lanes": _bordered((5, 28), n=2),
    "56_lanes": _bordered((3, 56), n=3),
    "3_lanes": _bordered((3, 3), n=5),
    "31_lanes": _bordered((2, 31), n=2),
    "one_column_of_lanes": _bordered((11, 1), n=3),
    "one_row_of_lanes": _bordered((1, 37), n=3),
    "two_bands_of_lanes": _bordered((9, 56), n=2),
    "two_bands_of_16_bits": _bordered((20, 56), n=1),
    "bands_of_vectors": _bordered((34, 14), n=2),
    "one_sample_of_lanes": _bordered((7, 6), n=1, c=48),
    "group_remainder_of_lanes": _bordered((5, 7), n=11, group_size=3),
    "group_beyond_all_lanes": _bordered((7, 10), n=3, group_size=9),
    "flushed_twice_by_lanes": _bordered((3, 4), n=530),
    "grouped_by_lanes": _bordered((7, 7), n=3, c=48, o=192, groups=3),
    "few_outputs_of_lanes": _bordered((7, 8), n=3, o=40),
    "more_outputs_of_lanes": _bordered((7, 7), n=2, c=24, o=136),
    "grouped_uneven_lanes": _bordered((6, 14), n=3, c=48, o=48, groups=2),
}

# Positions lie side by side.
PLANES: dict[str, dict] = {
    "odd_channels_of_planes": _bordered((7, 7), n=3, c=19, o=67),
    "grouped_planes": _bordered((5, 14), n=3, c=21, o=27, groups=3, group_size=2),
    "bands_of_words": _bordered((4, 255), n=1, o=128),
    "7_planes_of_14": _bordered((14, 14), n=3, o=128, stride=(2, 2)),
    "14_planes_of_28": _bordered((28, 28), n=2, stride=(2, 2)),
    "uneven_planes": _bordered((9, 13), n=5, c=19, o=67, stride=(2, 2), group_size=2),
    "bands_of_strided_planes": _bordered((23, 56), n=1, stride=(2, 2)),
}

# Channels lie side by side: of every second position, too.
PIXELS: dict[str, dict] = {
    "7_pixels_of_14": _bordered((14, 14), n=3, o=128, stride=(2, 2)),
    "14_pixels_of_28": _bordered((28, 28), n=2, stride=(2, 2)),
    "28_pixels_of_56": _bordered((7, 56), n=2, stride=(2, 2)),
    "uneven_pixels": _bordered((9, 13), n=5, c=20, o=68, stride=(2, 2), group_size=2),
    "uneven_vectors": _bordered((9, 13), n=5, c=24, o=72, stride=(2, 2), group_size=2),
    "8_pixels": _bordered((8, 8), n=3, c=32, o=128),
    "32_pixels": _bordered((9, 32), n=2),
    "4_pixels": _bordered((4, 4), n=9, group_size=2),
}
