"""Files of compressed models: safetensors of values, packed places and what is dense.

For a sparse layer NAME there are ``NAME.values`` [K], ``NAME.places`` (uint8, see
``packing``) and, where it has one, ``NAME.bias``; all other entries of the model's
state are there as they are. The metadata have one entry, ``fisherprune-sparse-1``: JSON
of ``layers``, for each sparse layer its dense weight's ``shape`` and whether a ``relu``
is in it, and ``sha256`` of all tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.files import write_bytes
from fisherprune.sparse.packing import unpack_places

FORMAT = "fisherprune-sparse-1"


class SparseFile:
    """What a file holds.

    Attributes:
        path: of the file, for messages.
        tensors: values and what is dense, by name.
        places: of the kept weights in each sparse layer.
        shapes: of the sparse layers' dense weights.
        relus: which sparse layers have a ReLU.
    """

    def __init__(
        self, path: str, tensors: dict[str, Tensor], layers: Mapping[str, Any]
    ) -> None:
        self.path, self.tensors = path, tensors
        self.places: dict[str, Tensor] = {}
        self.shapes = {n: tuple(layer["shape"]) for n, layer in layers.items()}
        self.relus = {name for name, layer in layers.items() if layer["relu"]}
        for name, shape in self.shapes.items():
            packed, values = (self._part(name, p) for p in ("places", "values"))
            self.places[name] = self._unpacked(name, shape, packed, values)
            del tensors[f"{name}.places"]

    def _part(self, name: str, part: str) -> Tensor:
        tensor = self.tensors.get(f"{name}.{part}")
        if tensor is None or tensor.dim() != 1:
            raise self.damaged(f"'{name}.{part}' is missing or has no single dimension")
        return tensor

    def _unpacked(
        self, name: str, shape: tuple[int, ...], packed: Tensor, values: Tensor
    ) -> Tensor:
        if packed.dtype != torch.uint8:
            raise self.damaged(f"'{name}.places' is no uint8")
        try:
            places = unpack_places(packed)
        except ValueError as error:
            raise self.damaged(f"{name!r}: {error}") from None
        total = torch.Size(shape).numel()
        if len(places) != len(values):
            numbers = f"{len(places)} places for {len(values)} values"
            raise self.damaged(f"{name!r} has {numbers}")
        if len(places) and int(places[-1]) >= total:
            last = int(places[-1])
            raise self.damaged(f"{name!r} has place {last} of {total}")
        return places

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of the sparse layers."""
        masks = {}
        for name, places in self.places.items():
            mask = torch.zeros(torch.Size(self.shapes[name]).numel(), dtype=torch.bool)
            mask[places] = True
            masks[f"{name}.weight"] = mask.view(self.shapes[name])
        return masks

    def damaged(self, what: str) -> FisherpruneError:
        """Return the error of a file that is not as it was written."""
        return FisherpruneError(f"sparse file {self.path!r} is damaged: {what}")


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write a file, whole or not at all."""
    layout = torch.contiguous_format
    own = {n: t.detach().cpu().clone(memory_format=layout) for n, t in tensors.items()}
    about = {"layers": layers, "sha256": _digest(own)}
    metadata = {FORMAT: json.dumps(about)}
    write_bytes(checked_path(path, "save"), to_bytes(own, metadata=metadata))


def read_file(path: str | os.PathLike[str]) -> SparseFile:
    """Read a file.

    Raises:
        FisherpruneError: where it is missing, damaged or another file.
    """
    path = checked_path(path, "load")
    if not Path(path).is_file():
        raise FisherpruneError(f"sparse file {path!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise FisherpruneError(f"sparse file {path!r} can't be read: {error}") from None
    return SparseFile(path, tensors, _layers(path, metadata, tensors))


def _layers(
    path: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return what the metadata say of layers, where the tensors are whole."""
    if FORMAT not in metadata:
        known = ", ".join(metadata) or "none"
        wanted = f"one that fisherprune.sparse.save wrote ({FORMAT})"
        raise FieldError(f"sparse file {path!r}", wanted, f"format {known}")
    try:
        about = json.loads(metadata[FORMAT])
        layers, digest = dict(about["layers"]), about["sha256"]
        fine = bool(layers) and all(
            isinstance(layer["relu"], bool)
            and all(isinstance(size, int) and size > 0 for size in layer["shape"])
            for layer in layers.values()
        )
    except (ValueError, KeyError, TypeError):
        fine = False
    if not fine:
        raise FisherpruneError(
            f"sparse file {path!r} is damaged: its metadata do not describe layers"
        )
    if digest != _digest(tensors):
        raise FisherpruneError(
            f"sparse file {path!r} is damaged: its tensors have another SHA-256 than "
            "when they were written"
        )
    return layers


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checked_path(path: str | os.PathLike[str], where: str) -> str:
    """Return a path.

    Raises:
        FisherpruneError: where it is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise FieldError(f"{where}: path", "a path", shown(path))
    return os.fspath(path)
