"""Loads the compiled kernels and knows the facts about them.

Importing this module registers the ops below ``torch.ops.fisherprune``.
"""

from __future__ import annotations

import torch

MEND = "reinstall with `pip install --no-build-isolation .` in the source folder"


try:
    import fisherprune._C as _C
except ImportError as error:
    raise ImportError(
        f"fisherprune: the compiled kernels (fisherprune._C) do not load beside torch "
        f"{torch.__version__}: {error}; {MEND}"
    ) from None


def _check_cuda_major(built: str, running: str | None) -> None:
    """Refuse kernels of one CUDA major version beside a torch of another."""
    if built and running and built.split(".")[0] != running.split(".")[0]:
        raise ImportError(
            f"fisherprune: the kernels are built for CUDA {built} but torch "
            f"{torch.__version__} runs on CUDA {running}; {MEND}"
        )


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
PATH: str = _C.__file__
"""The file they were loaded from."""


def cpu_capability() -> str:
    """Return the vector instructions the CPU kernels use: avx512, avx2 or portable."""
    return _C.cpu_capability()
