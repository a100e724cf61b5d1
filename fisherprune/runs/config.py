"""What a training run is: one frozen object of four parts, checked when it is made.

A part says what makes the mask, what the images and the network are, how it is trained,
or where the run happens. ``TrainConfig`` is all of them at once, so whoever needs one
part takes that part's type, and the fields stand side by side in files and commands.
An option of a run is one field here: with its default, its help, and its rules.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields

from fisherprune import models
from fisherprune.data import BATCH_SIZES, IMAGE_SIZES, MIRRORED, VALIDATION_SHARE
from fisherprune.errors import FieldError, shown
from fisherprune.masks.counts import checked_sparsity
from fisherprune.masks.densities import checked_densities
from fisherprune.masks.plan import check_pattern
from fisherprune.masks.scopes.registry import SCOPES
from fisherprune.masks.structures.registry import FORMS
from fisherprune.masks.ties import TIES
from fisherprune.rounds import SCHEDULES
from fisherprune.runs.kinds import KINDS, MAX_WHOLE, at_least, must, one_of
from fisherprune.runs.option import Effect, about, by_dataset, names, option
from fisherprune.scoring.criteria import CRITERIA
from fisherprune.statistics.settings import FLOWS, LABELS, Settings

VALIDATION_METRICS = ("accuracy", "f1")
MEMORY_FORMATS = ("auto", "contiguous", "channels_last")


def _can_be_path(text: str) -> bool:
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:  # half a character, as JSON can spell it
        return False
    return bool(encoded) and b"\0" not in encoded


def _own_rounds() -> str:
    several = [c for c in CRITERIA.values() if c.rounds > 1]
    return ", ".join(f"{c.code} {c.rounds}" for c in several)


_FOLDER = must(_can_be_path, "the name of a folder")


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """What every part shares."""

    seed: int = option(
        0,
        "of all random choices but the train/validation split",
        must(lambda seed: abs(seed) < 10**100, "of at most 100 digits"),
    )


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Seeded):
    """What makes the mask; a run that prunes nothing ignores it but for ``skip``."""

    method: str = option(
        "fts",
        f"criterion: {', '.join(CRITERIA)}; none trains densely",
        one_of(CRITERIA),
        metavar="CODE",
    )
    sparsity: float = option(
        0.9,
        "fraction of the prunable weights removed, from 0 to 1 (default: 0.9, or 0 for "
        "method none)",
    )
    scope: str = option(
        "global",
        "where scores compete: "
        + ", ".join(f"{name} ({one.help})" for name, one in SCOPES.items()),
        one_of(SCOPES),
    )
    densities: Mapping[str, float] | None = option(
        None,
        "relative density of each parameter for scope densities: a JSON file "
        '{"PARAMETER": NUMBER, ...} or the masks.safetensors of another run',
        metavar="FILE",
        hash=False,
    )
    min_per_layer: int = option(
        0, "weights that each layer keeps at least", at_least(0)
    )
    structure: str = option(
        "weights",
        "what is kept or pruned together: "
        + ", ".join(f"{form.text} ({form.help})" for form in FORMS),
    )
    rounds: int | None = option(
        None,
        "in how many rounds weights are scored and removed (default: the method's own "
        f"number: {_own_rounds()}, others 1)",
        at_least(1),
    )
    schedule: str = option(
        SCHEDULES[0],
        "how the share of the weights that is kept falls over the rounds: "
        f"{' or '.join(SCHEDULES)}",
        one_of(SCHEDULES),
    )
    skip: tuple[str, ...] | None = option(
        None,
        "prune all parameters but those with one of these parts in their name; "
        "'bias linear bn' is the choice of the published FTS code (default: the "
        "weights of Conv and Linear layers but the classifier)",
    )
    ties: str = option(
        "error",
        "what if equal scores decide which weights are kept: error ends the run, "
        "position keeps the first ones",
        one_of(TIES),
    )
    invert_scores: bool = option(False, "sanity check: keep the smallest scores")
    shuffle_masks: bool = option(
        False, "sanity check: permute each mask within its layer"
    )
    reinitialize: bool = option(
        False, "sanity check: draw new initial weights under the mask"
    )
    group_size: int = option(
        1,
        "samples whose mean gradient is squared as one; 1 is the exact empirical "
        "Fisher",
        at_least(1),
    )
    flow: str = option(
        Settings.flow,
        "of grasp, the parameters of whose gradient the flow is, beside those scored: "
        "trainable (all), weights (of Conv and Linear layers, as in the GraSP code) or "
        "scored (none)",
        one_of(FLOWS),
    )
    temperature: float = option(
        Settings.temperature,
        "of grasp, what the outputs are divided by; 200 in the paper's code",
        must(lambda value: 0 < value < math.inf, "a number above 0"),
    )
    inner_steps: int = option(
        Settings.inner_steps,
        "of prospr, the steps of SGD through which it differentiates; each takes a "
        "batch of --score-batch-size images, the loss after them one more",
        at_least(1),
    )
    inner_lr: float = option(
        Settings.inner_lr,
        "of prospr, the learning rate of these steps",
        must(lambda value: 0 < value < math.inf, "a number above 0"),
    )
    inner_momentum: float = option(
        Settings.inner_momentum,
        "of prospr, the momentum of these steps",
        must(lambda value: 0 <= value < 1, "in [0, 1)"),
    )
    ntk_draws: int = option(
        Settings.ntk_draws,
        "of ntk_sap, initializations for each batch",
        at_least(1),
    )
    ntk_epsilon: float = option(
        Settings.ntk_epsilon,
        "of ntk_sap, the size of the perturbations of weights",
        must(lambda value: 0 < value < math.inf, "a number above 0"),
    )
    labels: str = option(
        Settings.labels,
        "of squared gradients: given (by the data) or sampled (from the model); the "
        "mean gradient is always that of given labels",
        one_of(LABELS),
    )
    draws: int | None = option(
        Settings.draws,
        "random draws a sample: of sampled labels (default: 1), and of the curvature "
        "of obd (default: exact, a pass for each class)",
        at_least(1),
    )
    probes: int = option(
        Settings.probes,
        "random probes of the Hessian's diagonal, for methods hutchinson_*",
        at_least(1),
    )
    bn_warmup: bool = option(
        False,
        "before the scoring, set the BatchNorm statistics to those of the training "
        "images; the weights stay",
    )
    score_samples: int | None = option(
        None,
        "score on a stratified subset of this many training images (default: all)",
        at_least(1),
    )
    score_batch_size: int = option(
        256,
        "images scored at a time; more take more memory, the scores are the same but "
        "for prospr's, each of whose steps takes a batch",
        at_least(1),
        effect=Effect.ROUNDING,
    )

    @property
    def settings(self) -> Settings:
        """Return what the fields of the same names tell the passes."""
        return Settings(**{name: getattr(self, name) for name in names(Settings)})

    def check_mask(self) -> None:
        """Check the fields that depend on each other."""
        _ = self.settings
        checked_sparsity(self.sparsity)
        check_pattern(
            self.scope,
            densities=self.densities,
            min_per_layer=self.min_per_layer,
            structure=self.structure,
            sparsity=None if self.method == "none" else self.sparsity,
        )
        if self.shuffle_masks and self.structure != "weights":
            wanted = f"False for structure {self.structure}, which it would break"
            raise FieldError("shuffle_masks", wanted, True)
        if self.method != "none":
            return
        if self.sparsity != 0:
            wanted = "0 for method none, which prunes nothing"
            raise FieldError("sparsity", wanted, self.sparsity)
        for name in (
            *("scope", "min_per_layer", "structure", "rounds", "schedule"),
            *("invert_scores", "shuffle_masks", "reinitialize"),
        ):
            value, idle = getattr(self, name), getattr(MaskConfig, name)
            if value != idle:
                raise FieldError(name, f"{idle} for method none", value)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Seeded):
    """The images and the network for them."""

    model: str = option(
        "resnet18",
        f"network: {', '.join(models.MODELS)}, torchvision:NAME, or a function of your "
        "own that returns one: MODULE:FUNCTION or FILE.py:FUNCTION. The file that "
        "defines it is hashed, and the hash is a part of the run; what it imports is "
        "not",
        models.check_name,
    )
    model_source: str | None = option(
        None, "hash of the source of a model of your own; filled in", given=False
    )
    init: str = option(
        "default",
        f"initial weights: {'; '.join(f'{k}, {v}' for k, v in models.INITS.items())}",
        one_of(models.INITS),
    )
    dataset: str = option(
        "cifar10",
        f"images: {', '.join(IMAGE_SIZES)}. folder reads image files "
        "DATA_DIR/train/CLASS/* and DATA_DIR/test/CLASS/*; digits is built in",
        one_of(IMAGE_SIZES),
    )
    data_dir: str = option(
        "data",
        f"folder of the data; {', '.join(MIRRORED)} are downloaded to it",
        _FOLDER,
        effect=Effect.PLACE,
        metavar="DIR",
    )
    data_mirror: str | None = option(
        None,
        "download the archive from the folder at this address instead of its authors' "
        "server; it must have the same checksum",
        effect=Effect.PLACE,
        metavar="URL",
    )
    image_size: int | None = option(
        None,
        f"resize the images to this height and width {by_dataset(IMAGE_SIZES)}",
        at_least(8, 2**16),
    )
    validation_share: float = option(
        VALIDATION_SHARE,
        "share of the training images that is held out to choose the best weights, "
        "stratified, the same in every run; 0 trains on all, and the last weights are "
        "the best",
        must(lambda share: 0 <= share < 1, "in [0, 1)"),
    )
    train_samples: int | None = option(
        None,
        "train on a stratified subset of this many images (default: all)",
        at_least(2),
    )

    def check_data(self) -> None:
        """Check the fields that depend on each other."""
        mirror = self.data_mirror
        if mirror is None:
            return
        if self.dataset not in MIRRORED:
            wanted = f"left out for dataset {self.dataset}, which is not downloaded"
            raise FieldError("data_mirror", wanted, mirror)
        if not re.match(r"https?://", mirror):
            wanted = "an address that begins with http:// or https://"
            raise FieldError("data_mirror", wanted, mirror)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Seeded):
    """How the network is trained, before the mask and under it."""

    warmup_epochs: int = option(
        0, "epochs of dense training before the scoring", at_least(0)
    )
    epochs: int = option(160, "epochs after the mask is made", at_least(0))
    batch_size: int | None = option(
        None,
        "images a step; the last step of an epoch takes what is left "
        f"{by_dataset(BATCH_SIZES)}",
        at_least(2),
    )
    lr: float = option(
        0.01,
        "learning rate of SGD",
        must(lambda lr: 0 < lr < math.inf, "above 0 and finite"),
    )
    momentum: float = option(
        0.9, "momentum of SGD", must(lambda value: 0 <= value < 1, "in [0, 1)")
    )
    nesterov: bool = option(False, "Nesterov's momentum")
    weight_decay: float = option(
        5e-4,
        "weight decay of SGD",
        must(lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    )
    lr_drops: tuple[int, ...] = option(
        (60, 120),
        "epochs after which the learning rate drops",
        must(
            lambda drops: (
                all(1 <= drop <= MAX_WHOLE for drop in drops)
                and sorted(set(drops)) == list(drops)
            ),
            f"growing numbers of epochs from 1 to {MAX_WHOLE}",
        ),
    )
    lr_drop_factor: float = option(
        0.2,
        "what it is multiplied by at each drop",
        must(lambda value: 0 < value <= 1, "in (0, 1]"),
    )
    validation_every: int = option(
        1, "epochs from one validation to the next", at_least(1)
    )
    validation_metric: str = option(
        "accuracy",
        f"what the best weights are best in: {', '.join(VALIDATION_METRICS)}",
        one_of(VALIDATION_METRICS),
    )
    amp: bool = option(
        False,
        "train in bfloat16 (autocast); scores and tests stay float32",
        effect=Effect.ROUNDING,
    )
    memory_format: str = option(
        "auto",
        f"of images and weights: {', '.join(MEMORY_FORMATS)}",
        one_of(MEMORY_FORMATS),
        effect=Effect.ROUNDING,
    )
    compile: bool = option(
        False,
        "train through torch.compile: slow to start, then faster",
        effect=Effect.ROUNDING,
    )

    def check_training(self) -> None:
        """Check the fields that depend on each other."""
        if self.nesterov and self.momentum == 0:
            raise FieldError("momentum", "above 0 for nesterov", self.momentum)

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0 after the mask."""
        drops = sum(drop <= epoch for drop in self.lr_drops)
        return self.lr * self.lr_drop_factor**drops


@dataclass(frozen=True, kw_only=True)
class PlaceConfig:
    """Where a run happens, and what it writes."""

    device: str = option(
        "auto",
        "auto (cuda where there is one), cpu, cuda or cuda:INDEX",
        must(
            re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?").fullmatch,
            "auto, cpu, cuda or cuda:INDEX",
        ),
        must(lambda name: len(name.partition(":")[2]) <= 3, "cuda:999 at most"),
        effect=Effect.PLACE,
    )
    output_dir: str = option(
        "runs",
        "the run makes a folder of its own in it",
        _FOLDER,
        effect=Effect.PLACE,
        metavar="DIR",
    )
    tensorboard: bool = option(
        False, "write the metrics for TensorBoard too", effect=Effect.PLACE
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PlaceConfig, TrainingConfig, DataConfig, MaskConfig):
    """All there is to say about a run; the same config gives the same run.

    The defaults are the setting of Table 1 of arXiv 2502.11450v1 at sparsity 0.9.

    Raises:
        FisherpruneError: for a value no run can have.
    """

    def __post_init__(self) -> None:
        """Check every value that can be checked without data."""
        if isinstance(self.skip, str):  # one part, not its letters
            object.__setattr__(self, "skip", (self.skip,))
        if self.densities is not None:
            checked_densities(self.densities)
        for each in fields(self):
            self._check(each)
        self.check_mask()
        self.check_data()
        self.check_training()
        self.check_validation()
        if self.model_source is None:
            object.__setattr__(self, "model_source", models.source_hash(self.model))

    def _check(self, of: Field) -> None:
        """Check the value of a field by itself; make equal values alike."""
        value = getattr(self, of.name)
        type, _, optional = str(of.type).partition(" | ")
        if optional and value is None:
            return
        if kind := KINDS.get(type):
            if not kind.accepts(value):
                words = f"{kind.words} or None" if optional else kind.words
                raise FieldError(of.name, words, shown(value))
            value = kind.convert(value)
            object.__setattr__(self, of.name, value)
        for rule in about(of).rules:
            if wanted := rule(value):
                raise FieldError(of.name, wanted, shown(value))

    def check_validation(self) -> None:
        """Check that nothing is said of a validation that there is not."""
        if self.validation_share > 0:
            return
        for name in ("validation_every", "validation_metric"):
            value, idle = getattr(self, name), getattr(TrainConfig, name)
            if value != idle:
                wanted = f"{idle} where validation_share is 0: nothing is validated"
                raise FieldError(name, wanted, value)

    @property
    def training_batch_size(self) -> int:
        """``batch_size``, or the dataset's own."""
        return self.batch_size or BATCH_SIZES[self.dataset]
