"""Convolutions whose images the CUDA kernel keeps in shared memory, by name.

Arguments of ``moment_cases.make``: every width, unit and border that it tells apart.
"""

CASES: dict[str, dict] = {
    "4_wide": dict(n=5, c=19, o=70, size=(4, 4), kernel=(3, 3), padding=(1, 1)),
    "8_wide": dict(n=3, c=16, o=130, size=(8, 8), kernel=(3, 3), padding=(1, 1)),
    "16_wide": dict(n=2, c=6, o=5, size=(16, 16), kernel=(5, 5), padding=(2, 2)),
    "32_wide": dict(n=2, c=3, o=9, size=(9, 32), kernel=(3, 3), padding=(1, 1)),
    "64_wide": dict(n=2, c=2, o=3, size=(3, 64), kernel=(3, 3), padding=(1, 1)),
    "short_unit": dict(n=4, c=3, o=6, size=(4, 4), kernel=(2, 3), padding=(0, 1)),
    "short_last_unit": dict(n=3, c=3, o=6, size=(5, 8), kernel=(3, 3), padding=(1, 1)),
    "one_row": dict(n=3, c=3, o=6, size=(1, 16), kernel=(1, 7), padding=(0, 3)),
    "no_padding_in_window": dict(n=3, c=3, o=6, size=(10, 12), kernel=(3, 5)),
    "wide_padding_in_window": dict(
        n=3, c=3, o=6, size=(4, 4), kernel=(7, 7), padding=(5, 5)
    ),
    "stride_2_in_window": dict(
        n=3, c=3, o=6, size=(16, 16), kernel=(3, 3), stride=(2, 2), padding=(1, 1)
    ),
    "stride_2_to_4_wide": dict(
        n=3, c=3, o=6, size=(8, 8), kernel=(3, 3), stride=(2, 2), padding=(1, 1)
    ),
    "stride_1_3": dict(
        n=3, c=3, o=6, size=(6, 12), kernel=(3, 3), stride=(1, 3), padding=(1, 1)
    ),
    "stride_beyond_kernel": dict(
        n=2, c=3, o=6, size=(12, 32), kernel=(2, 2), stride=(3, 4)
    ),
    "dilation_in_window": dict(
        n=3, c=3, o=6, size=(9, 8), kernel=(3, 3), dilation=(2, 3), padding=(1, 3)
    ),
    "grouped_in_window": dict(
        n=3, c=12, o=9, size=(8, 8), kernel=(3, 3), padding=(1, 1), groups=3
    ),
    "many_channels_in_window": dict(
        n=2, c=80, o=8, size=(4, 4), kernel=(3, 3), padding=(1, 1)
    ),
    "group_remainder_in_window": dict(
        n=7, c=3, o=6, size=(4, 4), kernel=(3, 3), padding=(1, 1), group_size=3
    ),
    "group_remainder_of_units": dict(
        n=5, c=3, o=6, size=(8, 8), kernel=(3, 3), padding=(1, 1), group_size=2
    ),
    "group_beyond_all_in_window": dict(
        n=3, c=3, o=6, size=(4, 4), kernel=(3, 3), padding=(1, 1), group_size=9
    ),
    "2_wide": dict(n=13, c=19, o=130, size=(2, 2), kernel=(3, 3), padding=(1, 1)),
    "2_wide_wide_padding": dict(
        n=3, c=5, o=6, size=(2, 2), kernel=(5, 7), padding=(2, 3)
    ),
    "2_wide_unlike_sides": dict(
        n=3, c=5, o=6, size=(2, 2), kernel=(3, 1), padding=(1, 0)
    ),
    "2_wide_stride_3": dict(
        n=3, c=5, o=6, size=(2, 2), kernel=(3, 3), stride=(3, 3), padding=(2, 2)
    ),
    "2_wide_dilation": dict(
        n=3, c=5, o=6, size=(2, 2), kernel=(2, 3), dilation=(2, 1), padding=(1, 1)
    ),
    "2_wide_grouped": dict(
        n=9, c=12, o=9, size=(2, 2), kernel=(3, 3), padding=(1, 1), groups=3
    ),
    "2_wide_group_remainder": dict(
        n=19, c=3, o=6, size=(2, 2), kernel=(3, 3), padding=(1, 1), group_size=6
    ),
    "2_wide_many_samples": dict(
        n=530, c=1, o=2, size=(2, 2), kernel=(3, 3), padding=(1, 1)
    ),
    "many_samples_in_window": dict(
        n=270, c=1, o=2, size=(4, 4), kernel=(2, 3), padding=(0, 1)
    ),
}
