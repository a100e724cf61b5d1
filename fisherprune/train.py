"""Prune a network at initialization and train what is left.

``python -m fisherprune.train --help`` on the command line, ``run(TrainConfig(...))``
from Python. Below, from top to bottom: what a run does, its steps, the command line.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fisherprune import cli, models
from fisherprune.augment import TrainingBatches
from fisherprune.config import TrainConfig, resolve_device
from fisherprune.data import Augmentation, Dataset
from fisherprune.errors import FisherpruneError
from fisherprune.layers import prunable_parameters
from fisherprune.masks import Masks
from fisherprune.metrics import Meter, Metrics
from fisherprune.parts import Parts, load_parts
from fisherprune.progress import Shown
from fisherprune.prune import score
from fisherprune.runs import RunFolder, check_writable, environment
from fisherprune.streams import stream, stream_seed
from fisherprune.summary import (
    RunResult,
    check_pruned_are_zero,
    count_layers,
    duration,
    table,
)
from fisherprune.threshold import select_masks

TEST_BATCH = 1024
"""Images at a time where no gradient is needed."""


def run(config: TrainConfig, *, quiet: bool = False) -> RunResult:
    """Make a mask, train under it, test; write everything into the run's own folder.

    Warm-up epochs come first and keep the first learning rate; ``epochs`` and the drops
    are counted from the mask on. The optimizer goes on through the mask, under which
    its state is zero. Nothing depends on global random state, nor is it changed.

    Args:
        config: what to do.
        quiet: show no progress.

    Raises:
        FisherpruneError: for what only the machine or the data can tell: no such
            device, no data, more samples asked for than there are, a folder that can't
            be written to, a loss that is no longer finite.
    """
    device = resolve_device(config.device)
    check_writable(Path(config.output_dir))
    clock = Clock()
    parts = load_parts(config, device, quiet)
    model = models.create(
        config.model,
        len(parts.train.classes),
        parts.train.channels,
        seed=stream_seed(config.seed, "initialization"),
    ).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    folder = RunFolder(config)
    clock.lap("data")

    trainer = Trainer(config, model, optimizer, parts, folder, quiet)
    for _ in range(config.warmup_epochs):
        trainer.epoch("warmup")
    clock.lap("warmup")

    masks = None
    if config.method != "none":
        masks = make_masks(config, model, parts, quiet)
        masks.apply_(model)
        masks.hold(model, optimizer)
        folder.save_masks(masks)
    clock.lap("scoring")

    trainer.train()
    folder.save_weights("last", model)
    clock.lap("training")

    if masks is not None:
        check_pruned_are_zero(model, masks)
    layers = count_layers(prunable_parameters(model))
    last = best = evaluate(model, parts.test, "test, last", quiet)
    if trainer.best_epoch != config.epochs:
        model.load_state_dict(folder.load_weights("best"))
        best = evaluate(model, parts.test, "test, best", quiet)
    clock.lap("testing")
    result = RunResult(
        config=config,
        folder=folder.path,
        parameters=sum(p.numel() for p in model.parameters()),
        last=last,
        best=best,
        best_epoch=trainer.best_epoch,
        layers=layers,
        seconds=clock.laps,
        environment=environment(device),
    )
    folder.write_json("results.json", result.as_json())
    return result


class Clock:
    """Wall time of the phases of a run, in seconds."""

    def __init__(self) -> None:
        """Start."""
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the phase ``name``."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def make_masks(
    config: TrainConfig, model: nn.Module, parts: Parts, quiet: bool
) -> Masks:
    """Score the weights as the model is now and keep the largest scores."""
    if config.bn_warmup:
        measure_batchnorm(config, model, parts.train, quiet)
    scores = score(
        model,
        Shown(parts.scoring.batches(config.score_batch_size), "scoring", quiet=quiet),
        config.method,
        group_size=config.group_size,
        seed=stream_seed(config.seed, "random scores"),
    )
    return select_masks(scores, config.sparsity, config.scope)


@torch.no_grad()
def measure_batchnorm(
    config: TrainConfig, model: nn.Module, train: Dataset, quiet: bool
) -> None:
    """Replace the running statistics of BatchNorm by means over one pass."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    plain = replace(train, augmentation=Augmentation(padding=0, flip=False))
    order = stream(config.seed, "batchnorm order")
    batches = TrainingBatches(plain, config.training_batch_size, order, order)
    model.train()
    for images, _ in Shown(batches, "batchnorm", quiet=quiet):
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    0 after a whole run, 2 for a mistake of the user's (one line on stderr), 130 after
    Ctrl-C.
    """
    try:
        config, quiet = cli.parse(argv)
        print(table(run(config, quiet=quiet)))
        return 0
    except KeyboardInterrupt:
        print("fisherprune.train: interrupted", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        reason = f"{error}".splitlines()[0]
        hint = "a smaller --batch-size or --score-batch-size needs less memory"
        return _fail(f"{reason}; {hint}")
    except (FisherpruneError, OSError) as error:
        return _fail(str(error))


def _fail(reason: str) -> int:
    print(f"fisherprune.train: error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
