"""What a training run is: one frozen object, checked when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch

from fisherprune.data import IMAGE_SIZES
from fisherprune.errors import FisherpruneError, shown
from fisherprune.masks.densities import checked_densities
from fisherprune.masks.select import SCOPES, checked_scope, checked_sparsity
from fisherprune.models import MODELS
from fisherprune.runs.kinds import KINDS
from fisherprune.scoring.criteria import criteria

BATCH_SIZES = {"cifar10": 512, "cifar100": 512, "digits": 16, "folder": 512}
"""Images per step where none is asked for."""
MIRRORED = ("cifar10", "cifar100")
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 2**16
MAX_WHOLE = 2**31 - 1
"""Largest whole number of a run but for the seed; more is more than PyTorch takes."""
VALIDATION_METRICS = ("accuracy", "f1")
NOTHING_PRUNED = {
    "scope": "global",
    "invert_scores": False,
    "shuffle_masks": False,
    "reinitialize": False,
}
"""Values of the fields that say how masks are made, where none are made."""
MASK_FIELDS = (
    "scope",
    "densities",
    "skip",
    "invert_scores",
    "shuffle_masks",
    "reinitialize",
    "group_size",
    "bn_warmup",
    "score_samples",
    "score_batch_size",
)
"""Fields beside ``sparsity`` that change no training of a run that prunes nothing;
``skip`` still says which of its weights are counted."""
MEMORY_FORMATS = ("auto", "contiguous", "channels_last")


@dataclass(frozen=True)
class TrainConfig:
    """All there is to say about a run; the same config gives the same run.

    The defaults are the setting of Table 1 of arXiv 2502.11450v1 at sparsity 0.9.

    Raises:
        FisherpruneError: for a value no run can have.
    """

    method: str = "fts"
    """Criterion of ``fisherprune.criteria()``; ``none`` trains densely."""
    model: str = "resnet18"
    """Network of ``fisherprune.models.MODELS``."""
    dataset: str = "cifar10"
    """Dataset of ``fisherprune.data.IMAGE_SIZES``."""
    data_dir: str = "data"
    """Where the dataset is, or is downloaded to."""
    data_mirror: str | None = None
    """Address of a folder with the archive, instead of its authors' server."""
    image_size: int | None = None
    """Height and width of the images; None is the dataset's own."""
    train_samples: int | None = None
    """Size of a stratified subset of the training part; None is all."""
    sparsity: float = 0.9
    """Fraction of the prunable weights removed; 0 for method ``none``."""
    scope: str = "global"
    """Where scores compete; one of ``fisherprune.threshold.SCOPES``."""
    densities: Mapping[str, float] | None = field(default=None, hash=False)
    """Relative densities by parameter name, for scope ``densities`` alone."""
    skip: tuple[str, ...] | None = None
    """As in ``fisherprune.prunable_parameters``."""
    invert_scores: bool = False
    """Whether to keep the smallest scores: a sanity check of the criterion."""
    shuffle_masks: bool = False
    """Whether to permute each mask within its layer: does it matter which weights?"""
    reinitialize: bool = False
    """Whether to draw new initial weights under the mask: do their values matter?"""
    group_size: int = 1
    """Samples whose mean gradient is squared as one; 1 is the empirical Fisher."""
    warmup_epochs: int = 0
    """Dense training before the scoring."""
    bn_warmup: bool = False
    """Whether to measure the BatchNorm statistics before the scoring."""
    score_samples: int | None = None
    """Size of a stratified subset of the training images to score on; None is all."""
    score_batch_size: int = 256
    """Images scored at a time; no score depends on it."""
    epochs: int = 160
    """Epochs after the mask is made."""
    batch_size: int | None = None
    """Images per step; the last of an epoch takes what is left. None: BATCH_SIZES."""
    lr: float = 0.01
    """Learning rate of SGD at the start."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD, on all parameters."""
    lr_drops: tuple[int, ...] = (60, 120)
    """Epochs after which the learning rate drops."""
    lr_drop_factor: float = 0.2
    """What the learning rate is multiplied by at a drop."""
    seed: int = 0
    """Of every random stream of the run."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:i``."""
    validation_every: int = 1
    """Epochs from one validation to the next; the first is always validated."""
    validation_metric: str = "accuracy"
    """What the best weights are best in: one of VALIDATION_METRICS."""
    amp: bool = False
    """Whether to train in bfloat16 by autocast."""
    memory_format: str = "auto"
    """Of images and weights in training: one of MEMORY_FORMATS."""
    compile: bool = False
    """Whether to train through ``torch.compile``."""
    tensorboard: bool = False
    """Whether to write the metrics for TensorBoard too."""
    output_dir: str = "runs"
    """Where the run's own folder is made."""

    def __post_init__(self) -> None:
        """Check every value that can be checked without data."""
        if isinstance(self.skip, str):  # one part, not its letters
            object.__setattr__(self, "skip", (self.skip,))
        self._check_kinds()
        self._check_choices()
        self._check_numbers()
        self._check_together()

    def _check_kinds(self) -> None:
        """Check the types, which the annotations tell; make equal values alike."""
        if self.densities is not None:
            checked_densities(self.densities)
        for each in fields(self):
            value, optional = getattr(self, each.name), each.type.endswith(" | None")
            kind = KINDS.get(each.type.removesuffix(" | None"))
            if kind is None or (optional and value is None):
                continue
            words = f"{kind.words} or None" if optional else kind.words
            _require(kind.accepts(value), each.name, words, shown(value))
            object.__setattr__(self, each.name, kind.convert(value))

    def _check_choices(self) -> None:
        _one_of("method", self.method, criteria())
        _one_of("model", self.model, MODELS)
        _one_of("dataset", self.dataset, IMAGE_SIZES)
        _one_of("scope", self.scope, SCOPES)
        _one_of("validation_metric", self.validation_metric, VALIDATION_METRICS)
        _one_of("memory_format", self.memory_format, MEMORY_FORMATS)
        _require(
            re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?", self.device),
            "device",
            "auto, cpu, cuda or cuda:INDEX",
            self.device,
        )
        digits = self.device.partition(":")[2]
        _require(len(digits) <= 3, "device", "cuda:999 at most", self.device)
        for name in ("data_dir", "output_dir"):
            value = getattr(self, name)
            _require(value, name, "the name of a folder", repr(value))

    def _check_numbers(self) -> None:
        checked_sparsity(self.sparsity)
        for name, least in {
            "image_size": MIN_IMAGE_SIZE,
            "train_samples": 2,
            "group_size": 1,
            "warmup_epochs": 0,
            "score_samples": 1,
            "score_batch_size": 1,
            "epochs": 0,
            "batch_size": 2,
            "validation_every": 1,
        }.items():
            value = getattr(self, name)
            if value is None:
                continue
            most = MAX_IMAGE_SIZE if name == "image_size" else MAX_WHOLE
            _require(value >= least, name, f"at least {least}", shown(value))
            _require(value <= most, name, f"at most {most}", shown(value))
        _require(
            self.lr > 0 and math.isfinite(self.lr),
            "lr",
            "above 0 and finite",
            self.lr,
        )
        _require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        _require(
            self.weight_decay >= 0 and math.isfinite(self.weight_decay),
            "weight_decay",
            "at least 0 and finite",
            self.weight_decay,
        )
        _require(
            0 < self.lr_drop_factor <= 1,
            "lr_drop_factor",
            "in (0, 1]",
            self.lr_drop_factor,
        )
        _require(
            all(1 <= drop <= MAX_WHOLE for drop in self.lr_drops)
            and sorted(set(self.lr_drops)) == list(self.lr_drops),
            "lr_drops",
            f"growing numbers of epochs from 1 to {MAX_WHOLE}",
            " ".join(map(shown, self.lr_drops)),
        )

    def _check_together(self) -> None:
        if self.method == "none" and self.sparsity != 0:
            raise FisherpruneError(
                f"sparsity must be 0 for method none, which prunes nothing, "
                f"got {self.sparsity}"
            )
        if self.method == "none":
            for name, idle in NOTHING_PRUNED.items():
                value = getattr(self, name)
                _require(value == idle, name, f"{idle} for method none", value)
        checked_scope(self.scope, self.densities)
        if self.data_mirror is not None:
            _require(
                self.dataset in MIRRORED,
                "data_mirror",
                f"left out for dataset {self.dataset}, which is not downloaded",
                self.data_mirror,
            )
            _require(
                re.match(r"https?://", self.data_mirror),
                "data_mirror",
                "an address that begins with http:// or https://",
                self.data_mirror,
            )

    @property
    def training_batch_size(self) -> int:
        """``batch_size``, or the dataset's own."""
        if self.batch_size is not None:
            return self.batch_size
        return BATCH_SIZES[self.dataset]

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0 after the mask."""
        drops = sum(drop <= epoch for drop in self.lr_drops)
        return self.lr * self.lr_drop_factor**drops


def _require(fulfilled: object, name: str, wanted: str, got: object) -> None:
    if not fulfilled:
        raise FisherpruneError(f"{name} must be {wanted}, got {got}")


def _one_of(name: str, value: str, known) -> None:
    if value not in known:
        choices = ", ".join(known)
        raise FisherpruneError(f"{name} must be one of {choices}; got {value!r}")


def resolve_device(name: str) -> torch.device:
    """Return the device a config's ``device`` means on this machine.

    Raises:
        FisherpruneError: for a CUDA device that is not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if name == "cpu":
        return torch.device(name)
    if not available:
        raise FisherpruneError(
            f"device {name} must be present, but torch {torch.__version__} finds no "
            "CUDA device on this machine; use cpu or auto"
        )
    index = int(name.partition(":")[2] or 0)  # torch.device takes it modulo 256
    if index >= torch.cuda.device_count():
        raise FisherpruneError(
            f"device {name} must be present, but this machine has "
            f"{torch.cuda.device_count()} CUDA devices, counted from cuda:0"
        )
    return torch.device(name)
