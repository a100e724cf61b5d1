"""Settings: all that runs have in common besides method, sparsity and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fisherprune.data import BATCH_SIZES, IMAGE_SIZES
from fisherprune.report.printable import one_line
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.identity import distinct
from fisherprune.runs.option import names
from fisherprune.runs.parts.mask import MaskConfig

AXES = ("dataset", "model", "method", "sparsity", "seed")
"""Fields with a place of their own in every table; a setting is all the others."""

Setting = Mapping[str, object]


def setting(config: TrainConfig) -> Setting:
    """Return the fields that set a run apart from the default one, but for AXES."""
    usual = {
        "batch_size": BATCH_SIZES[config.dataset],
        "image_size": IMAGE_SIZES[config.dataset],
    }
    return {
        name: value
        for name, value in distinct(config).items()
        if name not in AXES and usual.get(name) != value
    }


def training(fields: Setting) -> Setting:
    """Return the part of a setting that a dense run shares."""
    return {k: v for k, v in fields.items() if k not in names(MaskConfig)}


def key(fields: Setting) -> str:
    """Return text that is equal for equal settings, and sorts the simple ones first."""
    text = json.dumps(fields, sort_keys=True)
    return f"{len(fields):03} {text}"


def common(settings: Sequence[Setting]) -> Setting:
    """Return the fields that all the settings share, at values besides the default."""
    first, *others = settings
    return {
        name: value
        for name, value in first.items()
        if all(name in other and other[name] == value for other in others)
    }


def label(fields: Setting, *, empty: str = "") -> str:
    """Return a setting as text: ``warmup_epochs=1, shuffle_masks``."""
    return ", ".join(_text(name, value) for name, value in fields.items()) or empty


def _text(name: str, value: object) -> str:
    if value is True:
        return name
    if isinstance(value, Mapping):
        text = json.dumps(value, sort_keys=True)
        return f"{name}={hashlib.sha256(text.encode()).hexdigest()[:6]}"
    if isinstance(value, list | tuple):
        return f"{name}={one_line('+'.join(map(str, value))) or 'none'}"
    if isinstance(value, float):
        return f"{name}={value:g}"
    return f"{name}={one_line(value)}"


def dataset_name(config: TrainConfig) -> str:
    """Return the dataset, with the folder's name for images from a folder."""
    if config.dataset != "folder":
        return config.dataset
    return f"folder {folder_name(config)}"


def folder_name(config: TrainConfig) -> str:
    """Return the name of the folder of the images, without the folders above it."""
    return one_line(Path(config.data_dir).name)
