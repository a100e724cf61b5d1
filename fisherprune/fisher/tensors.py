"""Files of tensors by name: safetensors, or those of ``torch.save``."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.parameters import fitted_names

NAMES_SHOWN = 3
FAILURES = (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError)


def read_tensors(path: Path, option: str) -> dict[str, Tensor]:
    """Return the tensors of a file; nothing in it is executed.

    A dictionary with the key "state_dict" stands for what is below that key.

    Raises:
        FisherpruneError: where it is missing, damaged or holds something else; the
            message calls the file by the ``option``.
    """
    if not path.is_file():
        raise FieldError(option, "a file of tensors", f"{path}, which is none")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (*FAILURES, pickle.UnpicklingError) as error:
        reason = f"{error}".strip().splitlines() or [type(error).__name__]
        raise FisherpruneError(f"{option} {path} can't be read: {reason[0]}") from None
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not isinstance(content, Mapping) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()
    ):
        wanted = "a file of tensors by name"
        raise FieldError(option, wanted, f"{path}, which holds something else")
    return dict(content)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a file into a model; all must be there, and no others.

    Names may have the prefixes of ``DataParallel`` and ``torch.compile``.

    Raises:
        FisherpruneError: where names or shapes are not the model's.
    """
    tensors, own = read_tensors(path, "weights"), model.state_dict()
    names = fitted_names(tensors, own) or {name: name for name in tensors}
    found = {names[name]: tensor for name, tensor in tensors.items()}
    odd = [*(own.keys() - found.keys()), *(found.keys() - own.keys())]
    if odd:
        several = ", ".join(sorted(odd)[:NAMES_SHOWN])
        more = ", ..." if len(odd) > NAMES_SHOWN else ""
        what = f"{len(odd)} names in one of both alone: {several}{more}"
        raise FieldError("weights", "those of the model", f"{path} with {what}")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            wanted = f"those of the model, {name} of shape {list(own[name].shape)}"
            raise FieldError("weights", wanted, f"{path} with {list(tensor.shape)}")
    model.load_state_dict(found)
