"""Where sums and scores are kept: beside the parameters, on the CPU, or in files."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.statistics.settings import CPU, Settings


@dataclass(frozen=True)
class Store:
    """The devices of the parameters, the CPU's memory, or memory-mapped files.

    A file's name is gone as soon as it is mapped, and its bytes with the tensor: no
    file is left behind, whatever becomes of the process.

    Args:
        place: None, "cpu" or a folder, as ``Settings.offload``.
    """

    place: str | os.PathLike[str] | None = None

    def holds(self, device: torch.device) -> bool:
        """Return whether a tensor on a device is where it is to be kept."""
        return self.place is None or (self.place == CPU and device.type == "cpu")

    def zeros(self, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return zeros of a tensor's shape that are kept here.

        Raises:
            FisherpruneError: where the folder has no room for them.
        """
        if self.place is None or self.place == CPU or not like.numel():
            device = like.device if self.place is None else CPU
            layout = torch.contiguous_format
            return torch.zeros_like(
                like, dtype=dtype, device=device, memory_format=layout
            )
        return _mapped(Path(self.place), like.numel(), dtype).view(like.shape)

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy that is kept here."""
        return self.zeros(tensor, dtype or tensor.dtype).copy_(tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        """Return the tensor where it is kept here, else a copy that is."""
        return tensor if self.holds(tensor.device) else self.copy(tensor)


BESIDE = Store()
"""Everything is on its parameter's device."""


def final_store(settings: Settings) -> Store:
    """Return where complete sums are kept."""
    return Store(settings.offload)


def first_store(settings: Settings) -> Store:
    """Return where sums are kept while they are added to.

    With a limit of memory, that is beside the parameters until a pass is over.
    """
    limited = settings.max_accumulator_bytes is not None
    return BESIDE if limited else Store(settings.offload)


def _mapped(folder: Path, count: int, dtype: torch.dtype) -> Tensor:
    size = count * dtype.itemsize
    try:
        handle, name = tempfile.mkstemp(prefix="fisherprune-", dir=folder)
        try:
            # Else a full disk ends the process when the memory is written to.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            return torch.from_file(name, True, count, dtype=dtype, device=CPU)
        finally:
            os.close(handle)
            os.unlink(name)
    except OSError as error:
        raise FisherpruneError(
            f"offload: the folder {folder} must hold {size} bytes more: "
            f"{error.strerror}"
        ) from None
