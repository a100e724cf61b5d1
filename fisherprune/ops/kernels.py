"""Loads the compiled kernels and knows the facts about them.

Importing this module registers the ops below ``torch.ops.fisherprune``. The kernels are
a library that knows no Python; beside it lies a module for each Python that it was made
for, which hands on what the library says of itself.
"""

from __future__ import annotations

import os
import platform
import struct
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

MEND = "reinstall with `pip install --no-build-isolation .` in the source folder"
RUNNING = platform.python_version()
LIBRARY = "_kernels.so"
NAME = "fisherprune._C"


def _load() -> tuple[ModuleType, str]:
    """Load the kernels beside this package, else those of an installed one.

    A source folder on ``sys.path`` hides the installed package, but it has kernels only
    if they were built in place, and then for one Python.
    """
    places = [Path(__file__).parents[1], *(Path(p, "fisherprune") for p in sys.path)]
    try:
        spec = PathFinder.find_spec(NAME, [os.fspath(place) for place in places])
        if spec is None or spec.loader is None or spec.origin is None:
            raise ImportError(_why_none(places))
        library = Path(spec.origin).with_name(LIBRARY)
        _check_whole(library)
        _check_whole(Path(spec.origin))
        torch.ops.load_library(library)
        module = sys.modules[NAME] = module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        sys.modules.pop(NAME, None)
        raise ImportError(
            f"fisherprune: the compiled kernels ({NAME}) do not load beside "
            f"torch {torch.__version__}: {error}; {MEND}"
        ) from None
    return module, os.fspath(library)


def _why_none(places: list[Path]) -> str:
    for place in places:
        if (place / LIBRARY).is_file():
            return f"those in {place} are for other Pythons than {RUNNING}"
    return f"there are none in {places[0]}, and none are installed"


def _check_whole(path: Path) -> None:
    """Refuse a file that was cut short: to load it would kill the process.

    The table of sections ends an ELF file; the header says where it is.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return
    whole = 64
    if len(header) == 64:
        (start,) = struct.unpack_from("<Q", header, 40)
        size, count = struct.unpack_from("<HH", header, 58)
        whole = start + size * count
    found = path.stat().st_size
    if found < whole:
        raise ImportError(f"{path} was cut short: it has {found} of {whole} bytes")


def _check_cuda_major(built: str, running: str | None) -> None:
    """Refuse kernels of one CUDA major version beside a torch of another."""
    if built and running and built.split(".")[0] != running.split(".")[0]:
        raise ImportError(
            f"fisherprune: the kernels are built for CUDA {built} but torch "
            f"{torch.__version__} runs on CUDA {running}; {MEND}"
        )


if TYPE_CHECKING:
    from fisherprune import _C

    PATH: str
    """The file they were loaded from."""
else:
    _C, PATH = _load()
_check_cuda_major(_C.cuda_version, torch.version.cuda)

CUDA_VERSION: str = _C.cuda_version
"""CUDA toolkit the kernels were built with, "" where they are C++ only."""
CUDA_ARCHS: str = _C.cuda_archs
"""Architectures of the CUDA kernels, as in TORCH_CUDA_ARCH_LIST."""
TORCH_VERSION: str = _C.torch_version
"""The torch whose headers the kernels were built with; any torch >= 2.11 runs them."""
COMPILER: str = _C.compiler
"""The C++ compiler and its version."""
SOURCE_HASH: str = _C.source_hash
"""``sources.source_hash`` of the csrc/ folder the kernels were built from."""


def cpu_capability() -> str:
    """Return the vector instructions the CPU kernels use: avx512, avx2 or portable."""
    return _C.cpu_capability()


def mkl_is_narrow() -> bool:
    """Return whether MKL's products use half of this processor's vectors."""
    return _C.mkl_is_narrow()
