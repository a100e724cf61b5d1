"""Which runs are the same: a hash of all that a run's result depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields, replace

from fisherprune.data import IMAGE_SIZES
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.option import Effect, about
from fisherprune.runs.parts.mask import SCORED
from fisherprune.scoring.criteria import get_criterion


def identity(config: TrainConfig) -> str:
    """Return 16 hexadecimal digits, the same for configs that mean the same run.

    Values that are the default are left out, so a field that a later version adds
    changes no identity; a value that is spelled out equals the default it equals.
    ``data_dir`` counts for the dataset ``folder``, which it chooses.
    """
    text = json.dumps(distinct(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def distinct(config: TrainConfig) -> dict[str, object]:
    """Return the fields that set a run apart from the default one."""
    own_rounds, scored = get_criterion(config.method).rounds, config.score_batch_size
    config = replace(
        config,
        batch_size=config.training_batch_size,
        image_size=config.image_size or IMAGE_SIZES[config.dataset],
        rounds=None if config.rounds == own_rounds else config.rounds,
        score_batch_size=None if scored == SCORED else scored,
    )
    values = asdict(config)
    return {
        field.name: values[field.name]
        for field in fields(config)
        if values[field.name] != field.default
        and (
            about(field).effect is not Effect.PLACE
            or (field.name, config.dataset) == ("data_dir", "folder")
        )
    }
