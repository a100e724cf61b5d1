"""The JSON files of the published FTS code (arXiv 2502.11450), read into TrainConfig.

What they mean, beside the plain fields: ``num_steps`` are all epochs, warm-up included,
and ``lr_drops`` count from the very start, where TrainConfig counts both from the mask.
``compressor.batch_size`` is the group size. Prunable is every parameter without "bias",
"linear" or "bn" in its name. Their ``grasp`` keeps the opposite end of GraSP's scores,
our ``grasp_reversed``. Mask batches above 4096 are squared here like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherprune.data import IMAGE_SIZES
from fisherprune.errors import FisherpruneError, shown
from fisherprune.experiments.dense import collapsed
from fisherprune.models import MODELS
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.kinds import NUMBER, TEXT, WHOLE, list_of
from fisherprune.runs.section import Section, make_config

SKIP = ("bias", "linear", "bn")
"""Parts of the names of parameters that the published code does not prune."""
METHODS = {
    code: code
    for code in (
        "none random magnitude grad_norm snip grasp fisher_diag fisher_pruner fts fbss"
    ).split()
} | {"grasp": "grasp_reversed"}
"""The published compressor classes, and what they are called here."""
METRICS = {"acc": "accuracy", "f1": "f1"}
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}
"""Classes of the datasets whose number is known without looking."""
PATHS = {
    "sparsity": "training.compressor.sparsity",
    "group_size": "training.compressor.batch_size",
    "warmup_epochs": "training.compressor.warmup",
    "epochs": "training.num_steps",
    "batch_size": "dataset.batch_size",
    "lr": "training.optimizer.learning_rate",
    "momentum": "training.optimizer.momentum",
    "weight_decay": "training.optimizer.w_decay",
    "lr_drops": "training.optimizer.lr_drops",
    "lr_drop_factor": "training.optimizer.lr_drop_factor",
    "validation_every": "validation.frequency",
    "output_dir": "general.output_dir",
}
"""Where TrainConfig's complaints belong in a file."""


Values = dict[str, Any]
"""Fields of a run, by name."""


@dataclass(frozen=True)
class PublishedRun:
    """One file: its run, and the results folder it names."""

    config: TrainConfig
    output: Path


def read_published(path: Path) -> PublishedRun:
    """Read one JSON file of the published schema.

    Raises:
        FisherpruneError: where it can't be read, a field is missing, unknown or of
            another type, or no run can have its values; names file and field.
    """
    whole = Section(path, _parse(path))
    values: Values = {"skip": SKIP}
    values |= _general(whole.section("general"))
    values |= _dataset(whole.section("dataset"))
    values |= _model(whole.section("model"), values["dataset"])
    values |= _training(whole.section("training"))
    values |= _validation(whole.section("validation"))
    whole.done()
    config = make_config(
        collapsed(values), lambda name: whole.place(PATHS.get(name, name))
    )
    return PublishedRun(config, Path(config.output_dir))


def _parse(path: Path) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"field {name!r} is there twice")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise FisherpruneError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FisherpruneError(f"{path}: must be a JSON file: {error}") from None


def _general(general: Section) -> Values:
    general.get("id", TEXT)
    general.get("description", TEXT)
    gpu = general.section("gpu")
    count, index = gpu.get("ngpus", WHOLE), gpu.get("gpu_id", WHOLE)
    gpu.done()
    if count not in (0, 1):
        raise gpu.wrong("ngpus", "0 or 1, a run takes one device", count)
    if index < 0:
        raise gpu.wrong("gpu_id", "at least 0", index)
    general.get("experiment", TEXT, ["pbt"])
    seed, output = general.get("seed", WHOLE), general.get("output_dir", TEXT)
    general.done()
    gpu_there = f"cuda:{index}" if torch.cuda.is_available() else "auto"
    device = gpu_there if count else "cpu"
    return {"output_dir": output, "device": device, "seed": seed}


def _dataset(section: Section) -> Values:
    values = {
        "dataset": _named(section, "class", IMAGE_SIZES),
        "batch_size": section.get("batch_size", WHOLE),
    }
    section.done()
    return values


def _model(section: Section, dataset: str) -> Values:
    model = _named(section, "class", MODELS)
    classes = section.get("num_classes", WHOLE)
    section.done()
    wanted = CLASSES.get(dataset, classes)
    if classes != wanted:
        raise section.wrong(
            "num_classes", f"{wanted}, the classes of {dataset}", classes
        )
    return {"model": model}


def _named(section: Section, name: str, known: Iterable[str]) -> str:
    """Return a name in our spelling; capitals make no difference."""
    value = section.get(name, TEXT)
    if value.lower() not in known:
        raise section.wrong(name, f"one of {', '.join(known)}", value)
    return value.lower()


def _training(training: Section) -> Values:
    steps = training.get("num_steps", WHOLE)
    criterion = training.section("criterion")
    criterion.get("class", TEXT, ["CE"])
    criterion.done()
    values = _optimizer(training.section("optimizer"))
    values |= _compressor(training.section("compressor"))
    training.done()
    if values["method"] == "none":  # never a mask: all epochs are of one kind
        return values | {"epochs": steps, "warmup_epochs": 0}
    return values | _after_warmup(training, steps, values)


def _after_warmup(training: Section, steps: int, values: Values) -> Values:
    """Return epochs and drops as counted from the mask on."""
    warmup, drops = values["warmup_epochs"], values["lr_drops"]
    if warmup and warmup >= steps:
        wanted = f"below num_steps, {shown(steps)}, which counts the warm-up too"
        raise training.wrong("compressor.warmup", wanted, warmup)
    early = [drop for drop in drops if drop <= warmup]
    if warmup and early:
        wanted = (
            f"after the warm-up of {shown(warmup)} epochs, which keeps the first lr"
        )
        raise training.wrong("optimizer.lr_drops", wanted, early[0])
    return {"epochs": steps - warmup, "lr_drops": tuple(x - warmup for x in drops)}


def _optimizer(optimizer: Section) -> Values:
    optimizer.get("class", TEXT, ["sgd"])
    values = {
        "lr": optimizer.get("learning_rate", NUMBER),
        "momentum": optimizer.get("momentum", NUMBER),
        "weight_decay": optimizer.get("w_decay", NUMBER),
        "lr_drops": optimizer.get("lr_drops", list_of(WHOLE)),
        "lr_drop_factor": optimizer.get("lr_drop_factor", NUMBER),
    }
    optimizer.done()
    return values


def _compressor(compressor: Section) -> Values:
    code = compressor.get("class", TEXT, METHODS)
    values = {
        "method": METHODS[code],
        "scope": compressor.get("mask", TEXT, ["global", "layer"]),
        "sparsity": compressor.get("sparsity", NUMBER),
        "warmup_epochs": compressor.get("warmup", WHOLE),
        "group_size": compressor.get("batch_size", WHOLE),
    }
    compressor.done()
    if code == "none" and values["sparsity"] != 0:
        wanted = "0 for none, which prunes nothing"
        raise compressor.wrong("sparsity", wanted, values["sparsity"])
    return values


def _validation(section: Section) -> Values:
    metric = METRICS[section.get("metric", TEXT, METRICS)]
    every = section.get("frequency", WHOLE)
    section.done()
    return {"validation_metric": metric, "validation_every": every}
