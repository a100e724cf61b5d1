"""Training epoch by epoch, and measuring a network on a part of the images."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from fisherprune.augment import TrainingBatches
from fisherprune.config import TrainConfig
from fisherprune.data import Dataset
from fisherprune.errors import FisherpruneError
from fisherprune.metrics import Meter, Metrics
from fisherprune.parts import Parts
from fisherprune.progress import Shown
from fisherprune.runs import RunFolder
from fisherprune.streams import stream
from fisherprune.summary import duration

TEST_BATCH = 1024
"""Images at a time where no gradient is needed."""


class Trainer:
    """Trains epoch by epoch, writes a row for each, keeps the best weights."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Parts,
        folder: RunFolder,
        quiet: bool,
    ) -> None:
        """Begin the streams of order and augmentation; trains nothing yet."""
        self.config, self.model, self.optimizer = config, model, optimizer
        self.parts, self.folder, self.quiet = parts, folder, quiet
        self.batches = TrainingBatches(
            parts.train,
            config.training_batch_size,
            stream(config.seed, "training order"),
            stream(config.seed, "augmentation"),
        )
        self.done = {"warmup": 0, "train": 0}
        self.seconds = {"warmup": 0.0, "train": 0.0}
        self.best_epoch, self.best_accuracy = 0, -1.0

    def train(self) -> None:
        """Train for the epochs of the config; ``best`` weights exist afterwards."""
        for epoch in range(self.config.epochs):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate(epoch)
            validation = self.epoch("train")
            if validation.accuracy > self.best_accuracy:
                self.best_epoch = epoch + 1
                self.best_accuracy = validation.accuracy
                self.folder.save_weights("best", self.model)
        if self.best_epoch == 0:
            self.folder.save_weights("best", self.model)

    def epoch(self, phase: str) -> Metrics:
        """Train for an epoch, validate, report; return the validation's metrics."""
        start = time.perf_counter()
        self.done[phase] += 1
        train = self._pass()
        validation = evaluate(
            self.model, self.parts.validation, "validation", self.quiet
        )
        seconds = time.perf_counter() - start
        self.seconds[phase] += seconds
        number, lr = self.done[phase], self.optimizer.param_groups[0]["lr"]
        columns = {"phase": phase, "epoch": number, "lr": lr}
        self.folder.add_epoch(
            train=train, validation=validation, **columns, seconds=round(seconds, 3)
        )
        if not self.quiet:
            print(self._line(phase, lr, train, validation, seconds), flush=True)
        if not math.isfinite(train.loss):
            raise FisherpruneError(
                f"training: the loss must stay finite, got {train.loss} in {phase} "
                f"epoch {number} at lr {lr:g}; a smaller --lr may help; what was "
                f"written until now is in {self.folder.path}"
            )
        return validation

    def _pass(self) -> Metrics:
        """Pass over the training images once, a step for each batch."""
        device = self.parts.train.images.device
        meter = Meter(len(self.parts.train.classes), device)
        self.model.train()
        for images, labels in Shown(self.batches, "training", quiet=self.quiet):
            with torch.autocast(device.type, torch.bfloat16, self.config.amp):
                logits = self.model(images)
                loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            meter.update(loss, logits, labels)
        return meter.compute()

    def _line(
        self, phase: str, lr: float, train: Metrics, valid: Metrics, seconds: float
    ) -> str:
        config = self.config
        planned = config.warmup_epochs if phase == "warmup" else config.epochs
        done = self.done[phase]
        left = (planned - done) * self.seconds[phase] / done
        remaining = f", {duration(left)} left" if done < planned else ""
        return (
            f"{phase:6} epoch {done:{len(str(planned))}}/{planned}"
            f"  lr {lr:.4g}"
            f"  train loss {train.loss:.4f} accuracy {100 * train.accuracy:.2f} %"
            f"  validation loss {valid.loss:.4f} accuracy {100 * valid.accuracy:.2f} %"
            f"  {duration(seconds)}{remaining}"
        )


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, what: str, quiet: bool) -> Metrics:
    """Measure the model on a part, in eval mode and float32, without augmentation."""
    meter = Meter(len(dataset.classes), dataset.images.device)
    model.eval()
    for images, labels in Shown(dataset.batches(TEST_BATCH), what, quiet=quiet):
        logits = model(images)
        meter.update(F.cross_entropy(logits, labels), logits, labels)
    return meter.compute()
