"""A callback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from math import prod
from typing import Any
from zlib import compress, decompress

import numpy as np
import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.integrations.holding import Loop, PruneOnce, each_sample_once, library
from fisherprune.losses import hugging_face

TrainerCallback: Any = library("transformers", "transformers").TrainerCallback

STATE = "fisherprune masks"
"""The name of the masks in the state of a Trainer."""


class PruningCallback(PruneOnce, TrainerCallback):
    """Prunes a Trainer's model as ``fisherprune.prune`` does, and holds the masks.

    The model is scored at the start of an epoch, on the Trainer's own batches and with
    the model's own loss of each sample. The masks are held to the end of the training:
    pruned weights are zero, whatever the optimizer. Checkpoints have the masks in their
    ``trainer_state.json``, as compressed bits; a training that is resumed from one with
    a ``PruningCallback``, whatever its arguments, holds these.

    Under ``torchrun`` all processes score their share of the batches. With
    ``load_best_model_at_end``, a checkpoint from before the pruning is pruned, too.

    Args:
        criterion: as in ``fisherprune.prune``.
        sparsity: as in ``fisherprune.prune``.
        scope: as in ``fisherprune.prune``.
        after_epochs: number of epochs that the model trains before.
        batches: to score on; by default those of an epoch of the Trainer.
        options: any others of ``fisherprune.prune``; ``losses`` is
            ``fisherprune.losses.hugging_face`` by default, which knows nothing of the
            Trainer's ``compute_loss_func``.

    Attributes:
        masks: None before the model is pruned.

    Raises:
        FisherpruneError: for any reason of ``fisherprune.prune``, the model is then
            left as it was; where the training ends before the model is pruned; where
            the Trainer smooths labels and no loss is given.

    Example:
        >>> import torch, transformers
        >>> config = transformers.BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = transformers.BertForSequenceClassification(config)
        >>> data = [{"input_ids": torch.arange(8), "labels": i % 2} for i in range(8)]
        >>> callback = PruningCallback("fts", sparsity=0.5)
        >>> options = {"save_strategy": "no", "report_to": "none", "use_cpu": True}
        >>> trainer = transformers.Trainer(
        ...     model,
        ...     transformers.TrainingArguments(max_steps=2, **options),
        ...     train_dataset=data,
        ...     callbacks=[callback],
        ... )
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> callback.masks.sparsity()
        0.5
    """

    _defaults = {"losses": hugging_face}

    def on_train_begin(
        self, args: Any, state: Any, *_: Any, model: nn.Module, **given: Any
    ) -> None:
        """Hold the masks of the checkpoint from which a training goes on."""
        smooth = getattr(args, "label_smoothing_factor", 0)
        if smooth and self._options.get("losses") is hugging_face:
            wanted = "given where the Trainer smooths labels"
            raise FieldError("losses", wanted, f"label_smoothing_factor={smooth}")
        if state.global_step or STATE in state.stateful_callbacks:
            self._resume(state.stateful_callbacks.get(STATE, {}))
        self._begin(Loop(model, [given["optimizer"]]), state.num_train_epochs)
        self._write(state)

    def on_epoch_begin(
        self, args: Any, state: Any, *_: Any, model: nn.Module, **given: Any
    ) -> None:
        """Prune if it is time."""
        loop = Loop(
            model,
            [given["optimizer"]],
            each_sample_once(given["train_dataloader"]),
            args.world_size,
            broadcasts=args.ddp_broadcast_buffers is not False,
        )
        self._prune_if_due(state.epoch or 0, loop)
        self._write(state)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """End the hold."""
        self._end()

    def _resume(self, written: Mapping[str, Any]) -> None:
        masks = {name: _unpacked(*each) for name, each in written.items()}
        if self._hooks is not None and self.masks != masks:
            raise FisherpruneError(
                "resume_from_checkpoint: the checkpoint was loaded while masks of a "
                "training that failed were held: call the callback's remove() before"
            )
        self._read({"masks": masks})
        self._model = None

    def _write(self, state: Any) -> None:
        if self.masks is not None and STATE not in state.stateful_callbacks:
            written = {name: _packed(mask) for name, mask in self.masks.items()}
            state.stateful_callbacks[STATE] = written


def _packed(mask: Tensor) -> tuple[str, list[int]]:
    """Return the bits of a mask as text for JSON, and its shape."""
    bits = np.packbits(mask.cpu().flatten().numpy())
    return b64encode(compress(bits.tobytes())).decode(), list(mask.shape)


def _unpacked(text: str, shape: list[int]) -> Tensor:
    """Return the mask of ``_packed``."""
    packed = np.frombuffer(decompress(b64decode(text)), np.uint8)
    bits = np.unpackbits(packed, count=prod(shape))
    return torch.from_numpy(bits).view(shape).bool()
