"""What a training run is: one frozen object of four parts, checked when it is made.

A part says what makes the mask, what the images and the network are, how it is trained,
or where the run happens. ``TrainConfig`` is all of them at once, so whoever needs one
part takes that part's type, and the fields stand side by side in files and commands.
An option of a run is one field of a part: with its default, its help, and its rules.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, fields

from fisherprune import models
from fisherprune.data import BATCH_SIZES
from fisherprune.errors import FieldError, shown
from fisherprune.masks.densities import checked_densities
from fisherprune.runs.kinds import KINDS
from fisherprune.runs.option import about
from fisherprune.runs.parts.data import DataConfig
from fisherprune.runs.parts.mask import MaskConfig
from fisherprune.runs.parts.place import PlaceConfig
from fisherprune.runs.parts.training import TrainingConfig


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
        self.check_processes()
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

    def check_processes(self) -> None:
        """Check that each of several processes has a device and images."""
        count = self.processes
        if count > 1 and self.device.startswith("cuda:"):
            wanted = (
                f"auto, cpu or cuda for {count} processes, each with a GPU of its own: "
                "choose GPUs by CUDA_VISIBLE_DEVICES"
            )
            raise FieldError("device", wanted, self.device)
        if self.training_batch_size < count:
            wanted = f"at least {count}, an image for each process"
            raise FieldError("batch_size", wanted, self.training_batch_size)

    @property
    def training_batch_size(self) -> int:
        """``batch_size``, or the dataset's own."""
        return self.batch_size or BATCH_SIZES[self.dataset]
