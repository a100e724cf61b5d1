"""What the statistics of a pass depend on, as one hash.

Bytes of weights and data, the code of the model and the settings of torch that change
values all count. What is not seen: hooks on modules, and functions of other files that
a model's own code calls.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fisherprune import kernels
from fisherprune.guards import Batches, Parameters, device_of, eager

BUILT_IN = vars(nn.Module()).keys() | {"_is_torch_compile", "_compiled_call_impl"}
"""Attributes that torch gives to modules: none of them says what they compute."""


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
    """
    digest = Digest()
    digest.add(version, kernels.SOURCE_HASH, group_size, list(parameters))
    model = eager(model)
    for line in _settings(device_of(parameters)):
        digest.add(*line)
    for line in _structure(model):
        digest.add(*line)
    for kind, named in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            digest.add(kind, name, tensor)
    for inputs, labels in batches:
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


def _structure(model: nn.Module) -> Iterator[tuple]:
    """Yield what a network computes beside its tensors: modules, settings and code."""
    classes = set()
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, _qualified(type(module))
        classes.add(type(module))
        for key in sorted(vars(module).keys() - BUILT_IN):
            yield key, *_plain(vars(module)[key])
    for cls in sorted(classes, key=_qualified):
        yield _qualified(cls), _source(cls)


def _plain(value: object) -> Iterator[object]:
    """Yield what a setting says; of an object the class, whose content isn't known."""
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, tuple | list):
        yield len(value)
        for item in value:
            yield from _plain(item)
    elif isinstance(value, Tensor | bool | int | float | complex | str | None):
        yield value
    elif hasattr(value, "__qualname__"):  # an activation function, say
        yield _qualified(value)
    else:
        yield _qualified(type(value))


def _qualified(value) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _source(cls: type) -> str:
    """Return the file a class is written in, empty for torch's and typed-in ones."""
    if cls.__module__.partition(".")[0] == "torch":
        return ""
    try:
        return Path(inspect.getsourcefile(cls)).read_text()
    except (OSError, TypeError):
        return ""
