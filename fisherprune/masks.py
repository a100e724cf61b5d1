"""Masks: which weights are kept, and how a model and its optimizer keep to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.files import write_bytes

FORMAT = "fisherprune-masks-1"


class Masks(Mapping[str, Tensor]):
    """Bool masks by parameter name, True = kept.

    Args:
        masks: bool tensors of the parameters' shapes.

    Raises:
        FisherpruneError: where there is no mask, or one is not bool.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        if not masks:
            raise FisherpruneError("Masks must hold at least one mask")
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise FisherpruneError(f"mask of {name!r} must be a bool tensor")
        self._masks = dict(masks)

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
        """Return the fraction of the weights removed."""
        return 1 - self.kept() / self.total()

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
            FisherpruneError: where the masks are of other parameters or shapes.
        """
        counts = self._overlaps(other).values()
        return _ratio(sum(b for b, _ in counts), sum(e for _, e in counts))

    def jaccard_by_layer(self, other: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the overlap of each parameter's masks; see ``jaccard``."""
        counts = self._overlaps(other).items()
        return {name: _ratio(both, either) for name, (both, either) in counts}

    def _overlaps(self, other: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
        """Count the weights that both keep, and those that either keeps, by name."""
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
        step, whatever the optimizer adds.

        Args:
            model: the model that ``optimizer`` trains.
            optimizer: any ``torch.optim`` optimizer over parameters of the model.

        Returns:
            A handle; ``remove()`` or leaving its ``with`` block ends it.

        Raises:
            FisherpruneError: where the masks do not fit the model, or the optimizer
                does not train a masked parameter.
        """
        pairs = self._pruned(model)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, (parameter, _) in zip(self, pairs, strict=True):
            if id(parameter) not in trained:
                raise FisherpruneError(f"hold: the optimizer does not train {name!r}")
        return Hold(pairs, optimizer)

    def save(self, path: str | os.PathLike) -> None:
        """Write the masks to a safetensors file, whole or not at all.

        Raises:
            OSError: where it can't be written.
        """
        tensors = {name: mask.cpu().contiguous() for name, mask in self.items()}
        write_bytes(path, save(tensors, metadata={"format": FORMAT}))

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
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise FisherpruneError(f"{os.fspath(path)!r} holds no masks")
                return cls({name: file.get_tensor(name) for name in file.keys()})
        except (SafetensorError, OSError) as error:
            raise FisherpruneError(
                f"mask file {os.fspath(path)!r} can't be read: {error}"
            ) from None


def _ratio(both: int, either: int) -> float:
    return both / either if either else 1.0


class Hold:
    """Keeps pruned weights at zero until removed; made by ``Masks.hold``."""

    def __init__(self, pairs, optimizer: torch.optim.Optimizer):
        self._pairs = pairs
        self._zero_weights()
        for parameter, pruned in pairs:
            for state in optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == pruned.shape:
                    state.masked_fill_(pruned, 0.0)
        self._handles = [
            p.register_post_accumulate_grad_hook(_mask_grad(pruned))
            for p, pruned in pairs
        ]
        self._handles.append(
            optimizer.register_step_post_hook(lambda *_: self._zero_weights())
        )

    @torch.no_grad()
    def _zero_weights(self) -> None:
        for parameter, pruned in self._pairs:
            parameter.masked_fill_(pruned, 0.0)

    def remove(self) -> None:
        """End the hold; may be called again."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


def _mask_grad(pruned: Tensor):
    def hook(parameter: nn.Parameter) -> None:
        parameter.grad.masked_fill_(pruned, 0.0)

    return hook
