"""What doors to training loops share: prune a model once, and hold its masks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fisherprune.errors import FieldError, FisherpruneWarning, shown
from fisherprune.masks.apply import pruned_weights
from fisherprune.masks.masks import Masks
from fisherprune.masks.optimizers import trained, unwrapped
from fisherprune.masks.plan import check_pattern
from fisherprune.packages import required
from fisherprune.pruning import find_masks, prune
from fisherprune.scoring.score import scoring_criteria
from fisherprune.statistics.batches import Batches

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def library(module: str, extra: str) -> ModuleType:
    """Return the library that a door opens to.

    Raises:
        FisherpruneError: where it is not installed; says which extra installs it.
    """
    need = f"fisherprune.integrations.{extra} needs {module.partition('.')[0]}"
    return required(module, need, f"pip install 'fisherprune[{extra}]'")


class Loop(NamedTuple):
    """What a training works on."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    batches: Batches = ()
    ranks: int = 1
    """Number of its processes, each of which has batches of its own."""
    broadcasts: bool = False
    """Whether each of its steps begins with the buffers of the first process."""


class Holding:
    """The masks of a model, and what holds them.

    Attributes:
        masks: those that were found or loaded; None before.
    """

    masks: Masks | None = None
    _hooks: ExitStack | None = None

    def remove(self) -> None:
        """End the hold; may be called again. The masks stay."""
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the masks, for a checkpoint."""
        return {"masks": {} if self.masks is None else dict(self.masks.to("cpu"))}

    def _read(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the masks of ``state_dict``, which are not held yet."""
        self.remove()
        self.masks = Masks(state["masks"]) if state["masks"] else None

    def _prune(self, loop: Loop, options: Mapping[str, Any]) -> Masks:
        """Find masks as ``fisherprune.prune`` does, and hold them.

        Raises:
            FisherpruneError: for any reason of ``prune``, or where the optimizers train
                none of the model's parameters; the model is then left as it was.
        """
        check_trained(loop)
        group = all_ranks(loop.ranks)
        if group is not None and loop.broadcasts:
            for buffer in loop.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        options = {"process_group": group, **options}
        sparsities = [options.pop("sparsity")]
        (masks,) = find_masks(
            loop.model, loop.batches, sparsities=sparsities, **options
        )
        self._hold(masks, loop)
        return masks

    def _hold(self, masks: Masks, loop: Loop) -> None:
        """Hold masks, each with the first optimizer that trains its weight."""
        check_trained(loop)
        model, left = loop.model, dict(masks)
        weights = pruned_weights(masks, model)
        self.remove()
        with ExitStack() as hooks:
            for optimizer in loop.optimizers:
                own = {id(p) for one in unwrapped(optimizer) for p in trained(one)}
                names = [name for name in left if id(weights[name][0]) in own]
                if names:
                    part = Masks({name: left.pop(name) for name in names})
                    hooks.enter_context(part.hold(model, optimizer))
            if left:  # of weights that are not trained
                hooks.enter_context(Masks(left).hold(model))
            self._hooks = hooks.pop_all()
        self.masks = masks


class PruneOnce(Holding):
    """What callbacks of trainers do: prune in the course of a training, then hold."""

    _defaults: Mapping[str, Any] = {}

    def __init__(
        self,
        criterion: str = "fts",
        sparsity: float = 0.9,
        scope: str = "global",
        *,
        after_epochs: int = 0,
        batches: Batches | None = None,
        **options: Any,
    ) -> None:
        chosen = {"criterion": criterion, "sparsity": sparsity, "scope": scope}
        options = chosen | options
        if "loss_fn" not in options:
            options = {**self._defaults, **options}
        signature(prune).bind(None, None, **options)
        scoring_criteria([criterion])
        pattern = {"densities", "min_per_layer", "structure"} & options.keys()
        given: dict[str, Any] = {name: options[name] for name in pattern}
        check_pattern(scope, sparsity=sparsity, **given)
        whole = isinstance(after_epochs, int) and not isinstance(after_epochs, bool)
        if not whole or after_epochs < 0:
            wanted = "a whole number of at least 0"
            raise FieldError("after_epochs", wanted, shown(after_epochs))
        self._options, self._batches = options, batches
        self._after_epochs = after_epochs
        self._model: weakref.ref[nn.Module] | None = None  # that was pruned last

    def _begin(self, loop: Loop, epochs: float) -> None:
        """Hold the model's masks if there are any at the start of a training.

        Raises:
            FisherpruneError: where the masks do not fit, or the training ends before
                the model is pruned.
        """
        if self._model is not None and self._model() is not loop.model:
            self.masks = None
        if self.masks is not None:
            self._hold(self.masks, loop)
        elif self._after_epochs >= epochs:
            wanted = f"less than the {epochs} epochs of the training"
            raise FieldError("after_epochs", wanted, self._after_epochs)

    def _prune_if_due(self, epoch: float, loop: Loop) -> None:
        """Prune the model at the start of an epoch, if it is time and it is not yet."""
        if self.masks is None and epoch >= self._after_epochs:
            own = self._batches
            batches = checked_loader(loop.batches) if own is None else own
            self._prune(loop._replace(batches=batches), self._options)
        self._model = weakref.ref(loop.model)

    def _end(self) -> None:
        """End the hold where the training ends."""
        self.remove()
        if self.masks is None:
            warnings.warn(
                "the model was not pruned: its training ended before epoch "
                f"{self._after_epochs} began",
                FisherpruneWarning,
                stacklevel=2,
            )


def each_sample_once(loader: Any) -> Batches:
    """Return the batches of an epoch of Accelerate's loader, or another one as it is.

    Processes repeat no sample to have as many. The loader stays at its epoch.
    """
    return _SamplesOnce(loader) if hasattr(loader, "iteration") else loader


class _SamplesOnce:
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        loader, sampler = self._loader, self._loader.batch_sampler
        even, epoch = getattr(sampler, "even_batches", False), loader.iteration
        try:
            if even:
                sampler.even_batches = False
            yield from loader
        finally:
            if even:
                sampler.even_batches = True
            loader.iteration = epoch


def checked_loader(loader: Any) -> Batches:
    """Return a trainer's batches if they come to an end.

    Raises:
        FisherpruneError: where that is not known.
    """
    try:
        len(loader)
    except TypeError:
        wanted = "given where the training dataloader has no length"
        raise FieldError("batches", wanted, "none") from None
    return loader


def all_ranks(ranks: int) -> ProcessGroup | None:
    """Return the group of all processes, None where there is one.

    Raises:
        FisherpruneError: where they don't meet by torch.distributed.
    """
    distributed = torch.distributed
    if ranks == 1:
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        wanted = "connected by torch.distributed"
        raise FieldError("processes", wanted, f"{ranks} that are not")
    return distributed.group.WORLD


def check_trained(loop: Loop) -> None:
    """Refuse optimizers that train other tensors, as those of sharded models may.

    Raises:
        FisherpruneError: where none of them trains any of the model's parameters.
    """
    own = {id(p) for p in loop.model.parameters()}
    every = [one for optimizer in loop.optimizers for one in unwrapped(optimizer)]
    if not any(id(p) in own for one in every for p in trained(one)):
        kinds = ", ".join(type(one).__name__ for one in loop.optimizers) or "none"
        wanted = "one that trains the model's own parameters, which are not sharded"
        raise FieldError("optimizer", wanted, kinds)
