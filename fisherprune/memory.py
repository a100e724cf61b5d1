"""Fresh zeros for many tensors at once, in huge pages where the system has them.

The first touch of fresh memory costs several times the arithmetic on it where the
system hands it out by pages of 4 KB. Linux gives 2 MB pages to those who ask, which
allocators do not. So all tensors of a call are cut from one slab of memory that asks.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ALIGNMENT = 64  # a cache line
TOUCHED = 1 << 10  # bytes of which one is written: every page, by enough for all threads
LEAST_BYTES = 2 * HUGE_PAGE  # smaller slabs are not worth a mapping of their own


def zeros_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous zeros of the tensors' shapes, dtypes and devices.

    On the CPU all of them may be parts of one mapping, each with a storage of its own
    (saving or pickling one writes its bytes alone). The mapping's memory goes back to
    the system when the last of them is gone.
    """
    on_cpu = {name: t for name, t in tensors.items() if t.device.type == "cpu"}
    zeros = _from_slab(on_cpu) or {}
    for name, t in tensors.items():
        if name not in zeros:
            zeros[name] = torch.zeros_like(
                t, memory_format=torch.contiguous_format, requires_grad=False
            )
    return {name: zeros[name] for name in tensors}


def _from_slab(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Cut zeros from one slab; None where it can't be had or is not worth it."""
    total = sum(_padded(t.nbytes) for t in tensors.values())
    slab = _slab(total) if total >= LEAST_BYTES else None
    if slab is None:
        return None
    zeros, at = {}, 0
    for name, t in tensors.items():
        if t.nbytes:
            zeros[name] = torch.frombuffer(
                slab[at : at + t.nbytes], dtype=t.dtype
            ).view(t.shape)
        at += _padded(t.nbytes)
    return zeros


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _slab(size: int) -> memoryview | None:
    """Return zeros in huge pages, or None where the system has no such thing."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        mapping = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages, or no memory
        return None
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE
    # It is zero already. But here each page is touched by one thread, where a kernel's
    # threads would meet at the same page, and all but one of them wait.
    whole[begin : begin + size : TOUCHED].zero_()
    return memoryview(mapping)[begin : begin + size]
