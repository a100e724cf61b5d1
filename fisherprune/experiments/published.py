"""The JSON files of the published FTS code (arXiv 2502.11450), read into TrainConfig.

What they mean, beside the plain fields: ``num_steps`` are all epochs, warm-up included,
and ``lr_drops`` count from the very start, where TrainConfig counts both from the mask.
``compressor.batch_size`` is the group size. Prunable is every parameter without "bias",
"linear" or "bn" in its name. Their ``grasp`` keeps the opposite end of GraSP's scores,
our ``grasp_reversed``. Mask batches above 4096 are squared here like any other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from fisherprune.data import IMAGE_SIZES
from fisherprune.errors import FisherpruneError, shown
from fisherprune.experiments.dense import collapsed
from fisherprune.experiments.fields import Section
from fisherprune.models import MODELS
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.kinds import NUMBER, TEXT, WHOLE, list_of

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


@dataclass(frozen=True)
class Published:
    """One file: its run, and the results folder it names."""

    config: TrainConfig
    output: Path


def read_published(path: Path) -> Published:
    """Read one JSON file of the published schema.

    Raises:
        FisherpruneError: where it can't be read, a field is missing, unknown or of
            another type, or no run can have its values; names file and field.
    """
    whole = Section(str(path), _parse(path))
    output, device, seed = _general(whole.section("general"))
    values = {"device": device, "seed": seed, "skip": SKIP, "output_dir": output}
    values |= _dataset(whole.section("dataset"))
    values |= _model(whole.section("model"), values["dataset"])
    values |= _training(whole.section("training"))
    values |= _validation(whole.section("validation"))
    whole.done()
    try:
        config = TrainConfig(**collapsed(values))
    except FisherpruneError as error:
        name, _, rest = str(error).partition(" ")
        raise FisherpruneError(f"{path}: {PATHS.get(name, name)} {rest}") from None
    return Published(config, Path(output))


def _parse(path: Path) -> object:
    def once(pairs):
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


def _general(general: Section) -> tuple[str, str, int]:
    """Return results folder, device and seed."""
    general.get("id", TEXT)
    general.get("description", TEXT)
    gpu = general.section("gpu")
    count, index = gpu.get("ngpus", WHOLE), gpu.get("gpu_id", WHOLE)
    gpu.done()
    if count not in (0, 1):
        raise gpu.error(
            "general.gpu.ngpus",
            f"must be 0 or 1, a run takes one device; got {shown(count)}",
        )
    if index < 0:
        raise gpu.error("general.gpu.gpu_id", f"must be at least 0, got {shown(index)}")
    general.get("experiment", TEXT, ["pbt"])
    seed, output = general.get("seed", WHOLE), general.get("output_dir", TEXT)
    general.done()
    gpu_there = f"cuda:{index}" if torch.cuda.is_available() else "auto"
    return output, gpu_there if count else "cpu", seed


def _dataset(section: Section) -> dict[str, object]:
    values = {
        "dataset": _named(section, "class", IMAGE_SIZES),
        "batch_size": section.get("batch_size", WHOLE),
    }
    section.done()
    return values


def _model(section: Section, dataset: str) -> dict[str, object]:
    model = _named(section, "class", MODELS)
    classes = section.get("num_classes", WHOLE)
    section.done()
    wanted = CLASSES.get(dataset, classes)
    if classes != wanted:
        raise section.error(
            "model.num_classes",
            f"must be {wanted}, the classes of {dataset}, got {shown(classes)}",
        )
    return {"model": model}


def _named(section: Section, name: str, known) -> str:
    """Return a name in our spelling; capitals make no difference."""
    value = section.get(name, TEXT)
    if value.lower() not in known:
        raise section.error(
            section.full(name), f"must be one of {', '.join(known)}; got {shown(value)}"
        )
    return value.lower()


def _training(training: Section) -> dict[str, object]:
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


def _after_warmup(training: Section, steps: int, values: dict) -> dict[str, object]:
    """Return epochs and drops as counted from the mask on."""
    warmup, drops = values["warmup_epochs"], values["lr_drops"]
    if warmup and warmup >= steps:
        raise training.error(
            "training.compressor.warmup",
            f"must be below num_steps, which counts the warm-up too: {shown(steps)}; "
            f"got {shown(warmup)}, which leaves no epoch after the mask",
        )
    early = [drop for drop in drops if drop <= warmup]
    if warmup and early:
        raise training.error(
            "training.optimizer.lr_drops",
            f"must be after the warm-up of {shown(warmup)} epochs, which keeps the "
            f"first learning rate; got {shown(early[0])}",
        )
    return {"epochs": steps - warmup, "lr_drops": tuple(x - warmup for x in drops)}


def _optimizer(optimizer: Section) -> dict[str, object]:
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


def _compressor(compressor: Section) -> dict[str, object]:
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
        raise compressor.error(
            "training.compressor.sparsity",
            f"must be 0 for none, which prunes nothing, got {values['sparsity']}",
        )
    return values


def _validation(section: Section) -> dict[str, object]:
    metric = METRICS[section.get("metric", TEXT, METRICS)]
    every = section.get("frequency", WHOLE)
    section.done()
    return {"validation_metric": metric, "validation_every": every}
