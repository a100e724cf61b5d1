"""The images of a run, and the network for them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fisherprune import models
from fisherprune.data import IMAGE_SIZES, MIRRORED, VALIDATION_SHARE
from fisherprune.errors import FieldError
from fisherprune.runs.kinds import FOLDER, at_least, must, one_of
from fisherprune.runs.option import Effect, by_dataset, option
from fisherprune.runs.parts.seeded import Seeded


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
        FOLDER,
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
