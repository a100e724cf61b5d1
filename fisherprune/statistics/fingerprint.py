"""What the statistics of a pass depend on, as one hash.

Bytes of weights and data, what the model holds, its code and the settings of torch that
change values all count. What is not seen: functions of other files that a model's own
code calls, and the values of global variables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fisherprune.ops import kernels
from fisherprune.parameters import Parameters, device_of
from fisherprune.statistics.batches import Batches, checked_batches
from fisherprune.statistics.contents import Reader


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
        self._add_bytes(flat.view(torch.uint8).numpy())

    def _add_bytes(self, content) -> None:
        self._hash.update(len(content).to_bytes(8, "little"))
        self._hash.update(content)

    def hexdigest(self) -> str:
        """Return the hash of all that was added."""
        return self._hash.hexdigest()


def fingerprint(
    model: nn.Module,
    batches: Batches,
    parameters: Parameters,
    *,
    group_size: int = 1,
    version: str = "",
) -> str:
    """Return a hash of all that the statistics of a pass depend on.

    Args:
        model: the network as it will be scored.
        batches: what will be scored; all of it is read. Cut into other batches, the
            same data have another hash: rounding differs.
        parameters: the parameters that the statistics are of, by name.
        group_size: as in ``gradient_moments``.
        version: of what is made of it all; another version gives another hash.

    Returns:
        32 hexadecimal digits.

    Raises:
        UnreadableError: where the model holds something that can't be read: an object
            of a class in C, or code that was typed in.
        FisherpruneError: where a batch is none.
    """
    digest = Digest()
    digest.add(version, kernels.SOURCE_HASH, group_size)
    device = device_of(parameters)
    for line in _settings(device):
        digest.add(*line)
    # The parameters after the model: each counts as the one of the model's that it is.
    for value in Reader().read((model, dict(parameters))):
        digest.add(value)
    for inputs, labels in checked_batches(batches, device):
        digest.add("batch", inputs, labels)
    return digest.hexdigest()[:32]


def _settings(device: torch.device) -> Iterator[tuple]:
    """Yield what of torch and the machine changes values, by rounding at least."""
    backends = torch.backends
    yield torch.__version__, device.type, backends.cudnn.deterministic
    if device.type == "cuda":
        yield (torch.cuda.get_device_name(device),)
    else:
        yield backends.cpu.get_cpu_capability(), kernels.cpu_capability()
    for backend in (
        backends,
        backends.cuda.matmul,
        backends.cudnn,
        backends.cudnn.conv,
        backends.mkldnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    ):
        yield (backend.fp32_precision,)
    if torch.is_autocast_enabled(device.type):
        yield "autocast", torch.get_autocast_dtype(device.type)
