"""Masks: which weights are kept, how they are compared, applied and written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError, shown
from fisherprune.files import write_bytes
from fisherprune.masks.hold import Hold

FORMAT = "fisherprune-masks-1"


class Masks(Mapping[str, Tensor]):
    """Bool masks by parameter name, True = kept.

    Args:
        masks: bool tensors of the parameters' shapes.

    Raises:
        FisherpruneError: where there is no mask, one is not bool, or a name is no
            string.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = _checked(masks, "Masks")

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        kept, total = self.kept(), self.total()
        return f"Masks({len(self)} parameters, {kept} of {total} weights kept)"

    def kept(self) -> int:
        """Return the number of weights kept."""
        return sum(int(mask.sum()) for mask in self.values())

    def total(self) -> int:
        """Return the number of weights under a mask."""
        return sum(mask.numel() for mask in self.values())

    def sparsity(self) -> float:
        """Return the fraction of the weights removed; 0 where there are none."""
        total = self.total()
        return 1 - self.kept() / total if total else 0.0

    def density(self) -> dict[str, float]:
        """Return the fraction of weights kept in each parameter."""
        return {
            name: int(mask.sum()) / mask.numel() if mask.numel() else 1.0
            for name, mask in self.items()
        }

    def jaccard(self, other: Mapping[str, Tensor]) -> float:
        """Return the overlap with other masks: weights kept by both / by either.

        Over all parameters together; 1 where neither keeps any.

        Raises:
            FisherpruneError: where ``other`` holds no masks, or its masks are of other
                parameters or shapes.
        """
        counts = self._overlaps(other).values()
        return _ratio(sum(b for b, _ in counts), sum(e for _, e in counts))

    def jaccard_by_layer(self, other: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the overlap of each parameter's masks; see ``jaccard``."""
        counts = self._overlaps(other).items()
        return {name: _ratio(both, either) for name, (both, either) in counts}

    def _overlaps(self, other: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
        """Count the weights that both keep, and those that either keeps, by name."""
        other = _checked(other, "jaccard")
        if set(self) != set(other):
            odd = sorted(set(self) ^ set(other))
            raise FisherpruneError(
                f"jaccard: masks must be of the same parameters, {odd[0]!r} is in one "
                "of them alone"
            )
        counts = {}
        for name, mask in self.items():
            if mask.shape != other[name].shape:
                raise FisherpruneError(
                    f"jaccard: masks of {name!r} must have one shape, got "
                    f"{list(mask.shape)} and {list(other[name].shape)}"
                )
            theirs = other[name].to(mask.device)
            # count_nonzero: sum first widens every bool to an int64, which is slower
            both, either = torch.count_nonzero(mask & theirs), mask | theirs
            counts[name] = int(both), int(torch.count_nonzero(either))
        return counts

    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of ``model`` to zero, once.

        Raises:
            FisherpruneError: where the model has no such parameter, or its shape is
                another.
        """
        with torch.no_grad():
            for parameter, pruned in self._pruned(model):
                parameter.masked_fill_(pruned, 0.0)

    def _pruned(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Pair the model's parameters with the inverted masks on their devices."""
        named, pairs = dict(model.named_parameters()), []
        for name, mask in self.items():
            if name not in named:
                raise FisherpruneError(
                    f"masks do not fit: {type(model).__name__} has no parameter "
                    f"{name!r}"
                )
            if named[name].shape != mask.shape:
                raise FisherpruneError(
                    f"masks do not fit: {name!r} of {type(model).__name__} has shape "
                    f"{list(named[name].shape)}, its mask {list(mask.shape)}"
                )
            pruned = torch.empty_like(named[name], dtype=torch.bool)
            pairs.append((named[name], pruned.copy_(~mask)))  # strides as the weight's
        return pairs

    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hold:
        """Keep the pruned weights of ``model`` exactly zero while it trains.

        Sets them and their optimizer state to zero now, so momentum from before the
        mask does not move them; masks their gradients after each backward pass, so
        clipping and norms see the pruned network's; and sets them to zero after each
        step, whatever the optimizer adds, and whenever ``load_state_dict`` loads them.

        What writes weights in another way, ``baselines.reinitialize_`` for instance, is
        undone by the next step or by ``apply_``. A copy (``copy.deepcopy``) of model
        and optimizer is not held: hold it anew. Masks of parameters that two optimizers
        train are split in two, ``Masks({name: masks[name] for name in names})``, and
        each part is held with its optimizer.

        Args:
            model: the model that ``optimizer`` trains.
            optimizer: any ``torch.optim`` optimizer over all masked parameters; frozen
                ones (``requires_grad`` False) may be missing.

        Returns:
            A handle; ``remove()`` or leaving its ``with`` block ends it.

        Raises:
            FisherpruneError: where the masks do not fit the model, or the optimizer
                does not train a masked parameter; nothing is changed then.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise FisherpruneError(
                f"hold: optimizer must be of torch.optim, got {shown(optimizer)}"
            )
        pairs = self._pruned(model)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, (parameter, _) in zip(self, pairs, strict=True):
            if parameter.requires_grad and id(parameter) not in trained:
                raise FisherpruneError(f"hold: the optimizer does not train {name!r}")
        return Hold(model, dict(pairs), optimizer)

    def save(self, path: str | os.PathLike) -> None:
        """Write the masks to a safetensors file, whole or not at all.

        Raises:
            OSError: where it can't be written.
        """
        # One entry: safetensors writes several in an order that differs each time.
        order = {FORMAT: json.dumps(list(self))}
        tensors = {name: _apart(mask) for name, mask in self.items()}
        write_bytes(path, save(tensors, metadata=order))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Masks:
        """Read masks that ``save`` wrote, onto the CPU.

        Raises:
            FisherpruneError: where the file is missing, damaged or holds no masks.
        """
        if not Path(path).is_file():
            raise FisherpruneError(f"mask file {os.fspath(path)!r} does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                names = _saved_order(file)
                masks = {name: file.get_tensor(name) for name in names or ()}
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise FisherpruneError(
                f"mask file {os.fspath(path)!r} can't be read: {error}"
            ) from None
        if names is None:
            raise FisherpruneError(f"{os.fspath(path)!r} holds no masks")
        return cls(masks)


def _saved_order(file: safe_open) -> list[str] | None:
    """Return the names of a file's masks as they were saved; None: it holds none."""
    metadata = file.metadata() or {}
    if FORMAT in metadata:
        return json.loads(metadata[FORMAT])
    # a file that was written before the order was
    return list(file.keys()) if metadata.get("format") == FORMAT else None


def _apart(mask: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU: a file takes no memory that is shared."""
    return mask.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _checked(masks: object, where: str) -> dict[str, Tensor]:
    """Return masks by name; errors begin with ``where``."""
    if not isinstance(masks, Mapping):
        raise FisherpruneError(
            f"{where}: masks must map parameter names to bool tensors, got "
            f"{shown(masks)}"
        )
    if not masks:
        raise FisherpruneError(f"{where}: masks must hold at least one mask, got none")
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise FisherpruneError(f"{where}: names must be strings, got {shown(name)}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else shown(mask)
            raise FisherpruneError(
                f"{where}: mask of {name!r} must be a bool tensor, got {got}"
            )
    return dict(masks)


def _ratio(both: int, either: int) -> float:
    return both / either if either else 1.0
