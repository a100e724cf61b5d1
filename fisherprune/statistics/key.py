"""The key of cached statistics: one hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from fisherprune.ops import kernels
from fisherprune.ops.sources import source_hash

CODE = source_hash(Path(__file__).parents[1], (".py",))
"""Of this package: networks and passes are among what the statistics depend on."""

BACKENDS = "cuda.matmul cudnn cudnn.conv mkldnn mkldnn.matmul mkldnn.conv"
"""What below ``torch.backends`` has an ``fp32_precision``, as that itself has."""


class Digest:
    """SHA-256 of a sequence of values; no two sequences are fed in the same bytes."""

    def __init__(self) -> None:
        """Begin."""
        self._hash = hashlib.sha256()

    def add(self, *values: object) -> None:
        """Add tensors by dtype, layout and content, other values by their ``repr``."""
        for value in values:
            if isinstance(value, Tensor):
                self._add_tensor(value)
            else:
                self._add_bytes(repr(value).encode())

    def _add_tensor(self, tensor: Tensor) -> None:
        self.add("tensor", tensor.dtype, tuple(tensor.shape), tensor.stride())
        flat = tensor.detach().cpu().contiguous().flatten()
        self._add_bytes(flat.view(torch.uint8).numpy().data)

    def _add_bytes(self, content: bytes | memoryview) -> None:
        self._hash.update(len(content).to_bytes(8, "little"))
        self._hash.update(content)

    def hexdigest(self) -> str:
        """Return the hash of all that was added."""
        return self._hash.hexdigest()


def statistics_key(
    about: Mapping[str, object],
    state: Mapping[str, Tensor],
    data: Iterable[Tensor],
    device: torch.device,
) -> str:
    """Return a hash of all that the statistics of a pass depend on.

    The code of this package and torch's settings are part of it, too.

    Args:
        about: what is not seen in tensors, for ``json.dumps``: which network it is, how
            images are normalized and cut into batches, which parameters and groups.
        state: the network's ``state_dict()``.
        data: images and labels in order.
        device: where the pass will run.

    Returns:
        32 hexadecimal digits.
    """
    digest = Digest()
    digest.add(CODE, kernels.SOURCE_HASH, *_settings(device))
    digest.add(json.dumps(about, sort_keys=True))
    for name, tensor in state.items():
        digest.add(name, tensor)
    digest.add("data", *data)
    return digest.hexdigest()[:32]


def _settings(device: torch.device) -> Iterator[object]:
    """Yield what of torch and the machine changes values, by rounding at least."""
    yield from (torch.__version__, device.type, torch.backends.cudnn.deterministic)
    if device.type == "cuda":
        yield torch.cuda.get_device_name(device)
    else:
        yield torch.backends.cpu.get_cpu_capability()
        yield kernels.cpu_capability()
    yield attrgetter("fp32_precision")(torch.backends)
    for backend in BACKENDS.split():
        yield attrgetter(f"{backend}.fp32_precision")(torch.backends)
    if torch.is_autocast_enabled(device.type):
        yield from ("autocast", torch.get_autocast_dtype(device.type))
