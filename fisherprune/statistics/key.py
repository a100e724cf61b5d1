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


def hash_of(*values: object) -> str:
    """Return the SHA-256 of values: different sequences are hashed as different bytes.

    Tensors count by dtype, layout and content, other values by their ``repr``.
    """
    digest = hashlib.sha256()
    for value in values:
        contents: list[bytes | memoryview] = []
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            contents.append(flat.view(torch.uint8).numpy().data)
            value = Tensor, value.dtype, tuple(value.shape), value.stride()
        for content in (repr(value).encode(), *contents):
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    return digest.hexdigest()


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
    facts = CODE, kernels.SOURCE_HASH, *_settings(device)
    named = (value for item in state.items() for value in item)
    return hash_of(*facts, json.dumps(about, sort_keys=True), *named, "data", *data)[
        :32
    ]


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
