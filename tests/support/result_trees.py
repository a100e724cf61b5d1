"""Results folders made by hand, with numbers that a test knows."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import asdict
from pathlib import Path

import torch

from fisherprune.masks.masks import Masks
from fisherprune.report import Report, load
from fisherprune.runs.config import TrainConfig

LAYERS = {"conv1.weight": 27, "layer1.0.conv1.weight": 288, "layer2.0.conv1.weight": 90}
PUBLISHED_METHODS = (
    "random magnitude grad_norm snip grasp_reversed fisher_diag fisher_pruner fts fbss"
).split()


def metrics(accuracy, loss=0.5):
    """Return metrics as results.json holds them, all shares equal."""
    shares = dict.fromkeys(("accuracy", "precision", "recall", "f1"), accuracy)
    return {"loss": loss} | shares


def result(config, best, last=None, layers=None, **changed):
    """Return the content of results.json; accuracies are shares."""
    density = 1 - config.sparsity
    layers = layers or {n: (max(1, int(t * density)), t) for n, t in LAYERS.items()}
    kept, total = (sum(x[i] for x in layers.values()) for i in (0, 1))
    content = {
        "format": 1,
        "config": asdict(config),
        "parameters": total + 10,
        "test": {
            "last": metrics(best if last is None else last),
            "best": metrics(best),
        },
        "best_epoch": config.epochs,
        "sparsity": 1 - kept / total,
        "kept": kept,
        "prunable": total,
        "flops": {"dense": 1000 * total, "masked": 900 * kept},
        "layers": {
            n: {"kept": k, "total": t, "effective": k - k // 4}
            for n, (k, t) in layers.items()
        },
        "warnings": [],
        "seconds": {"data": 1.0, "warmup": 0.0, "scoring": 2.5, "training": 60.0},
        "environment": {
            "fisherprune": "0.1.0",
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "torch": "2.15.0",
            "python": "3.11.2",
            "device": "Some Accelerator",
            "threads": 2,
            "cpus": 2,
        },
    }
    return content | changed


def add_run(root, best, last=None, *, layers=None, masks=True, epochs=3, **fields):
    """Write a finished run; return its folder."""
    config = TrainConfig(**fields)
    folder = new_folder(root, config)
    content = result(config, best, last, layers)
    write(folder / "config.json", content["config"])
    write(folder / "results.json", content)
    write_epochs(folder, epochs, best)
    if masks and config.method != "none":
        kept = {n: x["kept"] for n, x in content["layers"].items()}
        totals = {n: x["total"] for n, x in content["layers"].items()}
        made = random_masks(kept, totals, f"{config.method}{config.seed}")
        made.save(folder / "masks.safetensors")
    return folder


def new_folder(root, config):
    """Make a run's folder."""
    name = (
        f"{config.dataset}-{config.model}-{config.method}-{config.sparsity}"
        f"-seed{config.seed}"
    )
    number = len(list(Path(root).glob(f"runs/{name}-*")))
    folder = Path(root) / "runs" / f"{name}-{number:016x}"
    folder.mkdir(parents=True)
    return folder


def random_masks(kept, totals, seed):
    """Return masks of given counts, different for each seed."""
    numbers = random.Random(seed)
    masks = {}
    for name, total in totals.items():
        mask = torch.zeros(total, dtype=torch.bool)
        mask[numbers.sample(range(total), kept[name])] = True
        masks[name] = mask
    return Masks(masks)


def put(content, place, *value):
    """Set a value at a place like ``test/best/loss``; without a value delete it."""
    *tables, name = place.split("/")
    for table in tables:
        content = content[table]
    if value:
        (content[name],) = value
    else:
        del content[name]


def change(path, place, *value):
    """Put a value into a file of JSON, or take it out."""
    content = json.loads(path.read_text())
    put(content, place, *value)
    write(path, content)


def write(path, content):
    """Write JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_epochs(folder, epochs, accuracy, phase="train"):
    """Write metrics.csv; every second epoch is not validated."""
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            "phase epoch lr train_loss train_accuracy validation_loss "
            "validation_accuracy seconds".split()
        )
        for epoch in range(1, epochs + 1):
            share = epoch / epochs
            rest = [0.4, accuracy * share] if epoch % 2 else ["", ""]
            row = [phase, epoch, 0.01, 2.0 / epoch, accuracy * share, *rest, 0.5]
            writer.writerow(row)


def add_failed(root, error, **fields):
    """Write a run that failed; return its folder."""
    config = TrainConfig(**fields)
    folder = new_folder(root, config)
    write(folder / "config.json", asdict(config))
    failure = {"error": error, "traceback": "...", "time": "2026-01-01T00:00:00"}
    write(folder / "error.json", failure)
    return folder


def add_unfinished(root, **fields):
    """Write a run that only began; return its folder."""
    config = TrainConfig(**fields)
    folder = new_folder(root, config)
    write(folder / "config.json", asdict(config))
    return folder


def rows(text):
    """Return the lines of a CSV file."""
    return list(csv.DictReader(io.StringIO(text, newline="")))


def made(folder):
    """Return the report of a folder, nothing drawn."""
    return Report.of(load.load([folder]))
