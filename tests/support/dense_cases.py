"""Layers without taps that the CUDA kernel of 16-bit operands takes, by name.

Arguments of ``moment_cases.make``: every unit, and tiles that end within them.
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
