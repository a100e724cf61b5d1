"""A callback for the Trainer of Lightning, or of ``pytorch_lightning`` without it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from copy import copy
from importlib.util import find_spec
from itertools import islice
from typing import Any

from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneWarning
from fisherprune.integrations.holding import Loop, PruneOnce, library

PACKAGE = "lightning.pytorch" if find_spec("lightning") else "pytorch_lightning"
Callback: Any = library(PACKAGE, "lightning").Callback


class PruningCallback(PruneOnce, Callback):
    """Prunes a LightningModule as ``fisherprune.prune`` does, and holds the masks.

    The module is scored at the start of an epoch, on the Trainer's own batches. By
    default these are pairs ``(inputs, labels)``, the loss is cross-entropy of
    ``module(inputs)``; ``losses(module, batch)`` is another loss of each sample. The
    masks are held to the end of ``fit``: pruned weights are zero, whatever the
    optimizers and whoever steps them. Checkpoints have the masks; a ``fit`` that goes
    on from one holds these.

    On several devices (DDP) all processes score their share of the batches.

    Args:
        criterion: as in ``fisherprune.prune``.
        sparsity: as in ``fisherprune.prune``.
        scope: as in ``fisherprune.prune``.
        after_epochs: number of epochs that the module trains before.
        batches: to score on; by default those of an epoch of the Trainer.
        options: any others of ``fisherprune.prune``.

    Attributes:
        masks: None before the module is pruned.

    Raises:
        FisherpruneError: for any reason of ``fisherprune.prune``, the module is then
            left as it was; where the training ends before it is pruned.

    Example:
        >>> import lightning.pytorch, torch
        >>> class Net(lightning.pytorch.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.head = torch.nn.Linear(5, 8), torch.nn.Linear(8, 3)
        ...
        ...     def forward(self, x):
        ...         return self.head(self.body(x).relu())
        ...
        ...     def training_step(self, batch):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        >>> data = [(torch.randn(5), i % 3) for i in range(16)]
        >>> callback = PruningCallback("fts", sparsity=0.9)
        >>> quiet = dict.fromkeys(
        ...     ["logger", "enable_checkpointing", "enable_progress_bar"]
        ...     + ["enable_model_summary"],
        ...     False,
        ... )
        >>> trainer = lightning.pytorch.Trainer(
        ...     accelerator="cpu", max_epochs=2, callbacks=[callback], **quiet
        ... )
        >>> net = Net()
        >>> trainer.fit(net, torch.utils.data.DataLoader(data, 4))
        >>> callback.masks, int(torch.count_nonzero(net.body.weight))
        (Masks(1 parameters, 4 of 40 weights kept), 4)
    """

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Hold the masks of the checkpoint from which a training goes on."""
        epochs = trainer.max_epochs
        epochs = float("inf") if epochs is None or epochs < 0 else epochs
        self._begin(Loop(pl_module, trainer.optimizers), epochs)

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Prune if it is time."""
        loop = Loop(
            pl_module,
            trainer.optimizers,
            _Batches(trainer),
            trainer.world_size,
            broadcasts=getattr(trainer.model, "broadcast_buffers", False),
        )
        self._prune_if_due(trainer.current_epoch, loop)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """End the hold."""
        self._end()

    def on_exception(self, *_: Any) -> None:
        """End the hold."""
        self.remove()

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the masks of a checkpoint, to be held when the training starts."""
        self._read(state_dict)
        self._model = None


class _Batches:
    """The batches of an epoch as ``training_step`` gets them."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return self._trainer.num_training_batches  # a TypeError where it is infinite

    def __iter__(self) -> Iterator[Any]:
        trainer, module = self._trainer, self._trainer.lightning_module
        for batch in islice(self._loader(), len(self)):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch)

    def _loader(self) -> Any:
        loader = self._trainer.train_dataloader
        if isinstance(loader, list | tuple | dict):
            wanted = "given where there are several training dataloaders"
            raise FieldError("batches", wanted, f"{len(loader)} of them")
        sampler = getattr(loader, "sampler", None)
        extra = getattr(sampler, "total_size", 0) - len(getattr(sampler, "dataset", ()))
        if extra > 0:
            warnings.warn(
                f"the sampler repeats {extra} samples, so that all processes have as "
                "many: they count twice in the scores; batches= scores on others",
                FisherpruneWarning,
                stacklevel=2,
            )
        if getattr(loader, "persistent_workers", False):
            loader = copy(loader)
            loader._iterator = None  # that of the training has begun
        return loader
