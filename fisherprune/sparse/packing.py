"""Places of kept weights in few bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LONGEST = 5
"""Bytes of a gap; 35 bits."""


def pack_places(places: Tensor) -> Tensor:
    """Return ascending places as bytes: the gaps between them in LEB128.

    The gap of a place is how many entries are left out before it. LEB128 (as in DWARF
    and WebAssembly) writes its 7-bit digits, the lowest first; all bytes of a gap but
    its last have their highest bit set. So a gap takes one byte below 128, two below
    16,384: at random places of densities from 0.00025 on, at most 2 bytes on average.

    Args:
        places: int64 ``[K]``, strictly ascending, at least 0.

    Returns:
        uint8 ``[B]``.

    Example:
        >>> import torch
        >>> pack_places(torch.tensor([1, 2, 203])).tolist()
        [1, 0, 200, 1]
    """
    ascending = places.cpu().numpy()
    gaps = np.diff(ascending, prepend=-1) - 1
    lengths = np.ones(len(gaps), np.int64)
    for digit in range(1, LONGEST):
        lengths += gaps >= 1 << 7 * digit
    starts = np.cumsum(lengths) - lengths
    packed = np.zeros(int(lengths.sum()), np.uint8)
    for digit in range(LONGEST):
        has = lengths > digit
        more = (lengths[has] > digit + 1).astype(np.uint8) << 7
        packed[starts[has] + digit] = (gaps[has] >> 7 * digit & 127) | more
    return torch.from_numpy(packed)


def unpack_places(packed: Tensor) -> Tensor:
    """Return the places of ``pack_places``.

    Raises:
        ValueError: where the bytes end within a gap, or a gap has too many.

    Example:
        >>> import torch
        >>> unpack_places(torch.tensor([1, 0, 200, 1], dtype=torch.uint8))
        tensor([  1,   2, 203])
    """
    digits = packed.numpy()
    (ends,) = np.nonzero(digits < 128)
    if len(digits) and digits[-1] >= 128:
        raise ValueError("the places end within a number")
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    lengths = ends + 1 - starts
    if len(lengths) and lengths.max() > LONGEST:
        raise ValueError(f"a place has {lengths.max()} bytes, at most {LONGEST} may be")
    gaps = np.zeros(len(ends), np.int64)
    for digit in range(LONGEST):
        has = lengths > digit
        values = digits[starts[has] + digit].astype(np.int64) & 127
        gaps[has] += values << 7 * digit
    return torch.from_numpy(np.cumsum(gaps + 1) - 1)
