"""Training epoch by epoch, and measuring a network on a part of the images."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.data.augment import TrainingBatches
from fisherprune.data.dataset import Dataset
from fisherprune.errors import FisherpruneError, LayerCollapseWarning
from fisherprune.masks.masks import Masks
from fisherprune.models import MODELS
from fisherprune.parameters import prunable_parameters
from fisherprune.progress import WithBar
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.folder import ROW, RunFolder
from fisherprune.runs.metrics import Meter, Metrics
from fisherprune.runs.parts.training import TrainingConfig
from fisherprune.runs.result import Execution
from fisherprune.runs.words import duration, executed
from fisherprune.streams import stream
from fisherprune.train.checkpoint import State, misfit
from fisherprune.train.images import Images
from fisherprune.train.ranks import ALONE, Ranks
from fisherprune.train.sparsely import SparseTraining, expectation

TEST_BATCH = 1024
"""Images at a time where no gradient is needed."""


class Trainer:
    """Trains epoch by epoch, writes a row for each, knows the best one."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        images: Images,
        folder: RunFolder,
        quiet: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        """Begin the streams of order and augmentation; trains nothing yet."""
        self.ranks = ranks
        self.config, self.model, self.images = config, model, images
        self.folder, self.quiet = folder, quiet
        self.device = images.train.images.device
        self.memory_format = memory_format(config, self.device)
        self.amp = torch.autocast(self.device.type, torch.bfloat16, config.amp)
        model.to(memory_format=self.memory_format)
        self.network = compiled(model) if config.compile else model
        self.optimizer = make_optimizer(config, model)
        self.batches = TrainingBatches(
            images.train,
            config.training_batch_size,
            stream(config.seed, "training order"),
            stream(config.seed, "augmentation"),
            self.memory_format,
        )
        self.masks: Masks | None = None
        self.sparse: SparseTraining | None = None
        self.execution: Execution | None = None
        self.done = {"warmup": 0, "train": 0}
        self.seconds = {"warmup": 0.0, "train": 0.0}
        self.best_epoch, self.best_value = 0, -1.0

    def warm_up(self, save: Callable[[], None]) -> None:
        """Train for what is left of the warm-up, at the first learning rate."""
        while self.done["warmup"] < self.config.warmup_epochs:
            self.epoch("warmup")
            save()

    def train(self, save: Callable[[], None]) -> None:
        """Train for what is left of the epochs; ``save`` after each.

        Without validation images the last epoch is the best one.
        """
        with self._sparsely():
            while self.done["train"] < self.config.epochs:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.config.learning_rate(self.done["train"])
                validation = self.epoch("train")
                if validation is not None:
                    value = getattr(validation, self.config.validation_metric)
                    if value > self.best_value:
                        self.best_epoch, self.best_value = self.done["train"], value
                save()
        if len(self.images.validation) == 0:  # nothing to choose by
            self.best_epoch = self.config.epochs

    @contextmanager
    def _sparsely(self) -> Iterator[None]:
        """Train without the pruned weights, where that is to be done."""
        self.sparse = self._sparse_training()
        if self.sparse is None:
            yield
            return
        self.execution = self.execution or self.sparse.execution
        if not self.quiet:
            print(executed(self.execution, self.config.amp), flush=True)
        try:
            yield
        finally:
            self.sparse.end()
            self.sparse = None

    def _sparse_training(self) -> SparseTraining | None:
        """Make layers sparse, where the config, the masks and the model have it so."""
        config, images, masks = self.config, self.images.train, self.masks
        if masks is None or self.done["train"] == config.epochs:
            return None
        batch = next(iter(images.batches(config.training_batch_size)))
        expected = expectation(config, self.model, masks, batch[0])
        if expected is None:
            return None
        alone = self.ranks.size == 1  # several normalize by the statistics of all
        timed = batch if alone and self.execution is None else None
        what = self.model, masks, self.optimizer, expected
        try:
            return SparseTraining(*what, batch=timed, amp=self.amp, fuse=alone)
        except FisherpruneError:  # of a weight that is tied, say
            if config.sparse == "on":
                raise
            return None

    @property
    def is_best(self) -> bool:
        """Whether the weights are those of the best epoch so far, if there is one."""
        return 0 < self.best_epoch == self.done["train"]

    def prune(self, masks: Masks) -> None:
        """Train under the masks from now on."""
        self.masks = masks
        self.model.to(memory_format=self.memory_format)  # scored in another one
        with warnings.catch_warnings():  # the result tells of collapsed layers
            warnings.simplefilter("ignore", LayerCollapseWarning)
            masks.hold(self.model, self.optimizer)

    def state(self) -> State:
        """Return all that training goes on from; its tensors are not copies."""
        if self.sparse is None:
            model = self.model.state_dict()
            optimizer = self.optimizer.state_dict()["state"]
        else:
            model, optimizer = self.sparse.dense_state()
        return {
            "model": model,
            "optimizer": optimizer,
            "order": self.batches.order.get_state(),
            "augmentation": self.batches.chance.get_state(),
            "masks": None if self.masks is None else dict(self.masks),
            "execution": self.execution,
            "rows": self.folder.rows,
            **{name: getattr(self, name) for name in COUNTERS},
        }

    def form(self) -> dict[str, object]:
        """Return the form of ``state``, see ``checkpoint.misfit``."""
        parameters = prunable_parameters(self.model, self.config.skip)
        masks = {
            n: torch.empty_like(p, dtype=torch.bool) for n, p in parameters.items()
        }
        return self.state() | {
            "optimizer": dict,
            "masks": (None, masks),
            "execution": (None, EXECUTION),
            "rows": [ROW],
        }

    def restore(self, state: State) -> None:
        """Go on from what ``state`` returned.

        Raises:
            RuntimeError, ValueError: where it is of another model or training.
        """
        self._check_counters(state)
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {"state": state["optimizer"], "param_groups": groups}
        )
        self.batches.order.set_state(state["order"])
        self.batches.chance.set_state(state["augmentation"])
        self.folder.restore_rows(state["rows"])
        self.execution = state["execution"]
        for name in COUNTERS:
            setattr(self, name, state[name])
        if state["masks"] is not None:
            self.prune(Masks(state["masks"]))

    def _check_counters(self, state: State) -> None:
        done, config = state["done"], self.config
        momenta = dict(enumerate(self.model.parameters()))
        for index, entry in state["optimizer"].items():
            momentum = {"momentum_buffer": (None, momenta.get(index))}
            if index not in momenta or (entry and misfit(entry, momentum)):
                raise ValueError(f"optimizer state of parameter {index}")
        if not (
            0 <= state["best_epoch"] <= done["train"] <= config.epochs
            and 0 <= done["warmup"] <= config.warmup_epochs
            and len(state["rows"]) == sum(done.values())
        ):
            raise ValueError("number of epochs")

    def epoch(self, phase: str) -> Metrics | None:
        """Train for an epoch, report; return the metrics of the validation, if any."""
        start = time.perf_counter()
        self.done[phase] += 1
        train = self.pass_over(WithBar(self.batches, "training", quiet=self.quiet))
        validation = self._validate(phase)
        seconds = time.perf_counter() - start
        self.seconds[phase] += seconds
        number, lr = self.done[phase], self.optimizer.param_groups[0]["lr"]
        self.folder.add_epoch(
            phase=phase,
            epoch=number,
            lr=lr,
            train=train,
            validation=validation,
            seconds=seconds,
        )
        if not self.quiet:
            print(self._line(phase, lr, train, validation, seconds), flush=True)
        if not math.isfinite(train.loss):
            text = (
                f"training: the loss must stay finite, got {train.loss} in {phase} "
                f"epoch {number} at lr {lr:g}; {self.folder.diverged}"
            )
            raise self.ranks.alike(FisherpruneError(text))
        return validation

    def pass_over(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Metrics:
        """Take a step for each batch; nothing waits for the device before the end.

        Of several ranks each takes its share of every batch, and all the same steps.
        """
        device = self.device
        meter = Meter(len(self.images.train.classes), device)
        self.model.train()
        for images, labels in batches:
            share = self.ranks.share(len(labels))
            images, labels = images[share.rows], labels[share.rows]
            with self.amp, share.batchnorm():
                logits = self.network(images)
                loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward(share.weight(loss))
            self.ranks.add_up_gradients(self.model.parameters())
            self.optimizer.step()
            meter.update(loss, logits[: share.count], labels[: share.count])
        self.ranks.add_up(meter.sums)
        return meter.compute()

    def _validate(self, phase: str) -> Metrics | None:
        images, form = self.images.validation, self.memory_format
        done, every = self.done[phase], self.config.validation_every
        last = phase == "train" and done == self.config.epochs
        if len(images) == 0 or ((done - 1) % every and not last):
            return None
        return evaluate(self.model, images, "validation", self.quiet, form, self.ranks)

    def _line(
        self,
        phase: str,
        lr: float,
        train: Metrics,
        valid: Metrics | None,
        seconds: float,
    ) -> str:
        config = self.config
        planned = config.warmup_epochs if phase == "warmup" else config.epochs
        done = self.done[phase]
        left = (planned - done) * self.seconds[phase] / done
        remaining = f", {duration(left)} left" if done < planned else ""
        return (
            f"{phase:6} epoch {done:{len(str(planned))}}/{planned}"
            f"  lr {lr:.4g}"
            f"  train {_brief(train)}"
            + (f"  validation {_brief(valid)}" if valid is not None else "")
            + f"  {duration(seconds)}{remaining}"
        )


EXECUTION = dict.fromkeys(Execution.__annotations__, int) | {
    "expected": float,
    "dense_step": (None, float),
    "sparse_step": (None, float),
}
"""The form of what a checkpoint says of sparse training."""
COUNTERS = ("done", "seconds", "best_epoch", "best_value")
"""What a trainer counts, by attribute."""


def _brief(metrics: Metrics) -> str:
    return f"loss {metrics.loss:.4f} accuracy {100 * metrics.accuracy:.2f} %"


def make_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.SGD:
    """Return SGD with the settings of the config, one kernel for all it does."""
    return torch.optim.SGD(
        model.parameters(),
        config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def memory_format(config: TrainConfig, device: torch.device) -> torch.memory_format:
    """Return the memory format of training.

    ``auto`` is channels_last in bfloat16. In float32 it is so for ResNets on the CPU,
    where ``benchmarks.training`` found it faster, but not for VGG; and on CUDA where
    torch convolves in TF32, as it does by default: tensor cores read the channels
    innermost. The last is predicted; no GPU has measured it yet.
    """
    chosen = config.memory_format
    if chosen == "auto":
        resnet = config.model in MODELS and config.model.startswith("resnet")
        tf32 = attrgetter("cudnn.conv.fp32_precision")(torch.backends) == "tf32"
        faster = resnet if device.type == "cpu" else tf32
        chosen = "channels_last" if config.amp or faster else "contiguous"
    if chosen == "channels_last":
        return torch.channels_last
    return torch.contiguous_format


def compiled(model: nn.Module) -> nn.Module:
    """Wrap the model in torch.compile so that equal inputs give equal bits always.

    Each batch size gets code of its own: code for any size would replace it after the
    first other one, and a resumed run meets the sizes in another order.
    """
    network = torch.compile(model, dynamic=False, options={"deterministic": True})
    return cast(nn.Module, network)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    what: str,
    quiet: bool,
    memory_format: torch.memory_format = torch.contiguous_format,
    ranks: Ranks = ALONE,
) -> Metrics:
    """Measure the model on images, in eval mode and float32, without augmentation.

    Each of several ranks takes some of the batches.
    """
    meter = Meter(len(dataset.classes), dataset.images.device)
    model.eval()
    batches = WithBar(dataset.batches(TEST_BATCH), what, quiet=quiet)
    for images, labels in ranks.deal(batches):
        logits = model(images.contiguous(memory_format=memory_format))
        meter.update(F.cross_entropy(logits, labels), logits, labels)
    ranks.add_up(meter.sums)
    return meter.compute()


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Let cuDNN choose algorithms that give the same bits every time."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
