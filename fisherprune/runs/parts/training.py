"""How a network is trained, before the mask and under it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fisherprune.data import BATCH_SIZES
from fisherprune.errors import FieldError
from fisherprune.runs.kinds import MAX_WHOLE, at_least, must, one_of
from fisherprune.runs.option import Effect, by_dataset, option
from fisherprune.runs.parts.seeded import Seeded

VALIDATION_METRICS = ("accuracy", "f1")
MEMORY_FORMATS = ("auto", "contiguous", "channels_last")
SPARSE = ("auto", "on", "off")


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
        1,
        "epochs from one validation to the next; the first and the last epoch have one",
        at_least(1),
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
    processes: int = option(
        1,
        "processes that share each batch, on a machine or under torchrun; on GPUs each "
        "has one (default: 1, or the ranks of torchrun)",
        at_least(1),
        effect=Effect.ROUNDING,
    )
    compile: bool = option(
        False,
        "train through torch.compile: slow to start, then faster",
        effect=Effect.ROUNDING,
    )

    sparse: str = option(
        "auto",
        "train without the pruned weights, the same up to rounding: "
        f"{', '.join(SPARSE)}; auto: on a CPU where it is expected to be faster",
        one_of(SPARSE),
        effect=Effect.ROUNDING,
    )

    def check_training(self) -> None:
        """Check the fields that depend on each other."""
        if self.sparse == "on" and self.compile:
            raise FieldError("sparse", "auto or off with compile", self.sparse)
        if self.nesterov and self.momentum == 0:
            raise FieldError("momentum", "above 0 for nesterov", self.momentum)

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0 after the mask."""
        drops = sum(drop <= epoch for drop in self.lr_drops)
        return self.lr * self.lr_drop_factor**drops
