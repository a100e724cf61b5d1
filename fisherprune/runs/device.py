"""The device of a run."""

from __future__ import annotations

import platform

import torch

from fisherprune.errors import FisherpruneError


def resolve_device(name: str) -> torch.device:
    """Return the device a config's ``device`` means on this machine.

    Raises:
        FisherpruneError: for a CUDA device that is not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if name == "cpu":
        return torch.device(name)
    if not available:
        raise FisherpruneError(
            f"device {name} must be present, but torch {torch.__version__} finds no "
            "CUDA device on this machine; use cpu or auto"
        )
    index = int(name.partition(":")[2] or 0)  # torch.device takes it modulo 256
    if index >= torch.cuda.device_count():
        raise FisherpruneError(
            f"device {name} must be present, but this machine has "
            f"{torch.cuda.device_count()} CUDA devices, counted from cuda:0"
        )
    return torch.device(name)


def rank_device(name: str, local: int) -> torch.device:
    """Return the device of one of several processes of a machine.

    Args:
        name: a config's ``device``, without an index.
        local: number of the process on its machine.

    Raises:
        FisherpruneError: where there is no GPU for it.
    """
    device, count = resolve_device(name), torch.cuda.device_count()
    if device.type == "cpu":
        return device
    if local >= count:
        raise FisherpruneError(
            f"device {name}: each process of a machine must have a GPU of its own, but "
            f"process {local} (counted from 0) finds {count}; start fewer processes, "
            "or use cpu"
        )
    return torch.device("cuda", local)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the architecture of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.machine()
