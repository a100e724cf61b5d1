"""Layers without taps, which a CUDA kernel of their own takes, by name.

Arguments of ``moment_cases.make``: every unit, and tiles that end within them; in
POINTWISE, convolutions whose positions or channels lie side by side, with a stride too.
"""

CASES: dict[str, dict] = {
    "9_positions": dict(n=7, c=24, o=136, positions=(9,)),
    "16_positions": dict(n=9, c=136, o=8, positions=(4, 4)),
    "17_positions": dict(n=3, c=64, o=128, positions=(17,)),
    "32_positions": dict(n=5, c=40, o=72, positions=(32,)),
    "40_positions": dict(n=3, c=16, o=24, positions=(40,)),
    "64_positions": dict(n=3, c=16, o=24, positions=(64,)),
    "197_positions": dict(n=3, c=136, o=144, positions=(197,)),
    "group_remainder_of_positions": dict(
        n=7, c=16, o=24, positions=(20,), group_size=3
    ),
    "group_of_all_positions": dict(n=3, c=16, o=24, positions=(90,), group_size=9),
    "many_samples_of_positions": dict(n=270, c=8, o=8, positions=(9,)),
    "pointwise_channels_last": dict(n=3, c=48, o=32, size=(5, 7), kernel=(1, 1)),
    "pointwise_one_column": dict(n=3, c=48, o=32, size=(11, 1), kernel=(1, 1)),
    "pointwise_groups": dict(
        n=3, c=48, o=32, size=(6, 5), kernel=(1, 1), groups=2, group_size=2
    ),
}


def _pointwise(size, **shape) -> dict:
    return dict(c=24, o=136) | dict(n=3, size=size, kernel=(1, 1)) | shape


POINTWISE: dict[str, dict] = {
    "7_pointwise": _pointwise((7, 7), n=5),
    "14_pointwise": _pointwise((14, 14), c=136, o=8),
    "16_pointwise": _pointwise((4, 4), n=9, group_size=2),
    "uneven_pointwise": _pointwise((5, 6), group_size=9),
    "4_pointwise_of_8": _pointwise((8, 8), n=9, stride=(2, 2)),
    "uneven_pointwise_of_every_second": _pointwise(
        (13, 9), n=7, stride=(2, 2), group_size=3
    ),
    "14_pointwise_of_28": _pointwise((28, 28), n=2, c=8, o=16, stride=(2, 2)),
    "pointwise_of_a_third": _pointwise((10, 19), stride=(2, 3)),
    "pointwise_rows_of_every_second": _pointwise((9, 8), stride=(2, 1)),
    "pointwise_column_of_every_second": _pointwise((23, 1), stride=(2, 1)),
    "pointwise_groups_of_every_second": _pointwise(
        (9, 14), c=48, o=32, stride=(2, 2), groups=2
    ),
    "pointwise_flushed_twice": _pointwise((5, 5), n=270, c=8, o=8, stride=(2, 2)),
    "pointwise_of_odd_channels": _pointwise((7, 7), n=4, c=19, o=67),
}
