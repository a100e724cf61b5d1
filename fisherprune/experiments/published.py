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
from pathlib import Path
from typing import Any

import torch

from fisherprune.data import IMAGE_SIZES
from fisherprune.errors import shown
from fisherprune.experiments.dense import collapsed
from fisherprune.files import read_as
from fisherprune.models import MODELS
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.kinds import NUMBER, TEXT, WHOLE, Kind, list_of, named
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
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "tinyimagenet": 200}
"""Classes of the datasets whose number is known without looking."""


def _any_case(known: Iterable[str]) -> Kind[str]:
    """Return the kind of names that become our spelling, whatever their capitals."""
    return Kind(
        f"one of {', '.join(known)}",
        lambda value: isinstance(value, str) and value.lower() in known,
        str.lower,
    )


GPUS: Kind[int] = Kind(
    "0 or 1, a run takes one device",
    lambda value: WHOLE.accepts(value) and value in (0, 1),
)
INDEX: Kind[int] = Kind(
    "a whole number of at least 0", lambda value: WHOLE.accepts(value) and value >= 0
)
SCHEMA: dict[str, tuple[Kind[Any], str | None]] = {
    "general.id": (TEXT, None),
    "general.description": (TEXT, None),
    "general.gpu.ngpus": (GPUS, None),
    "general.gpu.gpu_id": (INDEX, None),
    "general.experiment": (named("pbt"), None),
    "general.seed": (WHOLE, "seed"),
    "general.output_dir": (TEXT, "output_dir"),
    "dataset.class": (_any_case(IMAGE_SIZES), "dataset"),
    "dataset.batch_size": (WHOLE, "batch_size"),
    "model.class": (_any_case(MODELS), "model"),
    "model.num_classes": (WHOLE, None),
    "training.num_steps": (WHOLE, "epochs"),
    "training.criterion.class": (named("CE"), None),
    "training.optimizer.class": (named("sgd"), None),
    "training.optimizer.learning_rate": (NUMBER, "lr"),
    "training.optimizer.momentum": (NUMBER, "momentum"),
    "training.optimizer.w_decay": (NUMBER, "weight_decay"),
    "training.optimizer.lr_drops": (list_of(WHOLE), "lr_drops"),
    "training.optimizer.lr_drop_factor": (NUMBER, "lr_drop_factor"),
    "training.compressor.class": (named(*METHODS), "method"),
    "training.compressor.mask": (named("global", "layer"), "scope"),
    "training.compressor.sparsity": (NUMBER, "sparsity"),
    "training.compressor.warmup": (WHOLE, "warmup_epochs"),
    "training.compressor.batch_size": (WHOLE, "group_size"),
    "validation.metric": (named(*METRICS), "validation_metric"),
    "validation.frequency": (WHOLE, "validation_every"),
}
"""All that a file holds, by path: what it must be, and the field of a run it sets."""
PATHS = {field: path for path, (_, field) in SCHEMA.items() if field}
"""Where TrainConfig's complaints belong in a file."""

Values = dict[str, Any]


def read_published(path: Path) -> TrainConfig:
    """Read one JSON file of the published schema: a run, in the folder that it names.

    Raises:
        FisherpruneError: where it can't be read, a field is missing, unknown or of
            another type, or no run can have its values; names file and field.
    """
    whole = Section(path, read_as(path, _parse, "must be a JSON file"))
    found = _read(whole)
    _check(whole, found)
    values = {field: found[path] for field, path in PATHS.items()}
    values |= {
        "skip": SKIP,
        "method": METHODS[values["method"]],
        "validation_metric": METRICS[values["validation_metric"]],
        "device": _device(found),
    }
    values |= _after_warmup(whole, values)
    return make_config(
        collapsed(values), lambda name: whole.place(PATHS.get(name, name))
    )


def _parse(text: str) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"field {name!r} is there twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def _read(whole: Section) -> Values:
    """Return the values of a file by their paths."""
    tables = {"": whole}

    def table(path: str) -> Section:
        if path not in tables:
            above, _, name = path.rpartition(".")
            tables[path] = table(above).section(name)
        return tables[path]

    found = {}
    for path, (kind, _) in SCHEMA.items():
        above, _, name = path.rpartition(".")
        found[path] = table(above).get(name, kind)
    for each in tables.values():
        each.done()
    return found


def _check(whole: Section, found: Values) -> None:
    """Raise FieldError for values that do not go together."""
    dataset, classes = found["dataset.class"], found["model.num_classes"]
    if classes != CLASSES.get(dataset, classes):
        wanted = f"{CLASSES[dataset]}, the classes of {dataset}"
        raise whole.wrong("model.num_classes", wanted, classes)
    sparsity = found["training.compressor.sparsity"]
    if found["training.compressor.class"] == "none" and sparsity != 0:
        wanted = "0 for none, which prunes nothing"
        raise whole.wrong("training.compressor.sparsity", wanted, sparsity)


def _device(found: Values) -> str:
    if found["general.gpu.ngpus"] == 0:
        return "cpu"
    there = torch.cuda.is_available()
    return f"cuda:{found['general.gpu.gpu_id']}" if there else "auto"


def _after_warmup(whole: Section, values: Values) -> Values:
    """Return epochs and drops as counted from the mask on."""
    if values["method"] == "none":  # never a mask: all epochs are of one kind
        return {"warmup_epochs": 0}
    warmup, steps, drops = (
        values[name] for name in ("warmup_epochs", "epochs", "lr_drops")
    )
    if warmup and warmup >= steps:
        wanted = f"below num_steps, {shown(steps)}, which counts the warm-up too"
        raise whole.wrong(PATHS["warmup_epochs"], wanted, warmup)
    early = [drop for drop in drops if drop <= warmup]
    if warmup and early:
        wanted = (
            f"after the warm-up of {shown(warmup)} epochs, which keeps the first lr"
        )
        raise whole.wrong(PATHS["lr_drops"], wanted, early[0])
    return {"epochs": steps - warmup, "lr_drops": tuple(x - warmup for x in drops)}
