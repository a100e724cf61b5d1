"""Builds the emulated kernels and runs cases on them: see emulator.h and cases.cpp."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
if platform.machine() != "x86_64":  # the fibers switch in its assembly
    COMPILER = None
FLAGS = [
    "-std=c++17",
    "-O1",  # compiling takes longer than running
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size",  # AddressSanitizer finds the same
    "-fno-sanitize-recover=all",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TILES = (
    *("small", "square", "tall", "window", "slim_window", "dense", "taps"),
    *("slim_taps", "wgmma", "slim_wgmma", "lanes", "slim_lanes"),
)


def build(name: str) -> Path:
    """Compile NAME.cpp, unless an executable of the same sources is there."""
    headers = ROOT.glob("csrc/**/*.*h")
    sources = [HERE / f"{name}.cpp", *sorted(HERE.glob("*.h")), *sorted(headers)]
    text = b"".join(s.read_bytes() for s in sources) + " ".join(FLAGS).encode()
    program = ROOT / "build" / "emulator" / (name + hashlib.sha256(text).hexdigest())
    program.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(program.with_suffix(".lock")):  # several processes run tests
        if not program.exists():
            fresh = program.with_suffix(".new")
            command = [COMPILER, *FLAGS, f"-I{HERE}", f"-I{ROOT / 'csrc'}", sources[0]]
            subprocess.run([*command, "-o", fresh], check=True)
            fresh.rename(program)
    return program


def words(*values: int) -> bytes:
    """Return 64-bit words."""
    return struct.pack(f"<{len(values)}q", *values)


def array(data: np.ndarray) -> bytes:
    """Return an array with its size in front."""
    data = np.ascontiguousarray(data).tobytes()
    return words(len(data)) + data


def numbers(values) -> bytes:
    """Return a list of integers as an array."""
    return array(np.array(list(values), np.int64))


def run(cases: list[bytes], folder: Path) -> list[bytes]:
    """Run encoded cases, return the arrays that they write."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "cases", folder / "results"
    source.write_bytes(b"".join(cases))
    done = subprocess.run(
        [build("cases"), source, target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    data, arrays, at = target.read_bytes(), [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<q", data, at)
        arrays.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return arrays


def _storage(t: Tensor, shift: int) -> np.ndarray:
    """Return the bytes from the tensor's first element to its last one."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    flat = t.as_strided((last + 1 if t.numel() else 0,), (1,))
    return np.pad(flat.view(torch.uint8).numpy(), (shift, 0))


def _view(t: Tensor, shift: int) -> bytes:
    return words(DTYPES[t.dtype], shift, *t.stride())


def moments_case(
    input: Tensor,
    grad: Tensor,
    sum: Tensor,
    sum_sq: Tensor,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups: int = 1,
    group_size: int = 1,
    allow_tf32: bool = False,
    tile: str | None = None,
    copies: bool = False,
    multiprocessors: int = 4,
    seed: int = 1,
    shift: int = 0,
) -> bytes:
    """Encode a call of grad_moments; `shift` bytes lie before the data.

    With `copies` the tile is for copies of the operands, see pixels.cuh.
    """
    kernel = sum.shape[2:]
    sizes = (*input.shape, *grad.shape[1:], *kernel, *stride, *padding, *dilation)
    return b"".join(
        [
            words(0, seed, multiprocessors),
            numbers([*sizes, groups, group_size]),
            words(allow_tf32, TILES.index(tile) if tile else -1, copies),
            array(_storage(input, shift)),
            array(_storage(grad, shift)),
            _view(input, shift),
            _view(grad, shift),
            array(sum.numpy()),
            array(sum_sq.numpy()),
        ]
    )


def cycles_case(input: Tensor, grad: Tensor, sum: Tensor, *rest, **options) -> bytes:
    """Encode the same call, whose accesses to shared memory are counted."""
    case = moments_case(input, grad, sum, *rest, **options)
    return words(8) + case[len(words(0)) :]


def _scores(scores: list[np.ndarray], shift: int) -> bytes:
    parts = [words(shift) + array(s) for s in scores]
    return words(len(scores)) + b"".join(parts)


def topk_case(
    scores, keep, ranks=(), *, shift: int = 0, multiprocessors: int = 2, seed: int = 1
) -> bytes:
    """Encode a call of global_topk; `shift` moves the scores by bytes."""
    place = words(1, seed, multiprocessors) + _scores(scores, shift)
    return place + numbers(keep) + numbers(ranks)


def histogram_case(scores, prefix: int, prefix_bits: int, digit_bits: int) -> bytes:
    """Encode a call of topk_histogram."""
    return words(2, 1, 2) + _scores(scores, 0) + words(prefix, prefix_bits, digit_bits)


def masks_case(scores, threshold: float, ties) -> bytes:
    """Encode a call of topk_masks."""
    value = array(np.array([threshold], np.float32))
    return words(3, 1, 2) + _scores(scores, 0) + value + numbers(ties)


def window_case(width: int, stride: int) -> bytes:
    """Encode the question how images lie in shared memory, for `width` positions."""
    size, same = width * stride, [stride, stride, 1, 1, 1, 1]
    return words(6, 1, 1) + numbers(
        [2, 64, size, size, 64, width, width, 3, 3, *same, 1, 1]
    )


def plan_case(
    n: int,
    channels: int,
    outputs: int,
    size: int,
    group_size: int = 1,
    *,
    kernel: int = 3,
    stride: int = 1,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> bytes:
    """Encode the question how a convolution with a border is planned on an H100."""
    padding = kernel // 2
    out = (size + 2 * padding - kernel) // stride + 1
    images = [n, channels, size, size, outputs, out, out, kernel, kernel]
    rest = [stride, stride, padding, padding, 1, 1, 1, group_size]
    layout = words(DTYPES[dtype], channels_last)
    return words(7, 1, 132) + numbers([*images, *rest]) + layout


def switch_case(archs: str, major: int, minor: int) -> bytes:
    """Encode the question whether FISHERPRUNE_CUDA_WGMMA suits a build and device."""
    text = np.frombuffer(archs.encode(), np.uint8)
    return words(9, 1, 1) + array(text) + words(major, minor)


def divider_case(positions, widths) -> bytes:
    """Encode divisions of positions by image widths."""
    return words(4, 1, 1) + numbers(positions) + numbers(widths)


def search_case(counts, left) -> bytes:
    """Encode searches for where the sum of counts reaches each number left."""
    return words(5, 1, 1) + numbers(counts) + numbers(left)
