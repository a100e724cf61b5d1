"""The JSON files of the published code, and what they mean here."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import result_trees as trees
import torch

from fisherprune.errors import FisherpruneError
from fisherprune.experiments.published import METHODS, SCHEMA, SKIP, read_published
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.identity import identity

REFERENCE = sorted((Path(__file__).parents[2] / "studies" / "reference").glob("*.json"))


def test_the_ten_published_methods_at_the_setting_of_the_table():
    runs = {read_published(path) for path in REFERENCE}
    assert {run.method for run in runs} == set(METHODS.values())
    table = TrainConfig(skip=SKIP)
    for run in runs:
        wanted = TrainConfig(method="none", sparsity=0.0)
        if run.method != "none":
            wanted = replace(table, method=run.method)
        assert identity(run) == identity(wanted)


def test_published_fields_and_what_they_mean(exp, written, tmp_path):
    exp["general"] |= {"seed": 7, "output_dir": str(tmp_path / "out")}
    exp["general"]["gpu"] = {"ngpus": 0, "gpu_id": 0}
    exp["dataset"] = {"class": "cifar100", "batch_size": 64}
    exp["model"] = {"class": "VGG19", "num_classes": 100}
    exp["training"] |= {"num_steps": 20}
    exp["training"]["optimizer"] |= {"lr_drops": [6, 12], "momentum": 0}
    exp["training"]["compressor"] = {
        "class": "grasp",
        "mask": "layer",
        "sparsity": 0.98,
        "warmup": 2,
        "batch_size": 5000,
    }
    exp["validation"] = {"metric": "f1", "frequency": 3}
    assert read_published(written(exp)) == TrainConfig(
        method="grasp_reversed",
        model="vgg19",
        dataset="cifar100",
        sparsity=0.98,
        scope="layer",
        skip=SKIP,
        group_size=5000,
        warmup_epochs=2,
        epochs=18,
        batch_size=64,
        momentum=0.0,
        lr_drops=(4, 10),
        seed=7,
        device="cpu",
        validation_every=3,
        validation_metric="f1",
        output_dir=str(tmp_path / "out"),
    )


def test_a_gpu_is_taken_where_there_is_one(exp, written, monkeypatch):
    exp["general"]["gpu"]["gpu_id"] = 3
    for available, device in ((False, "auto"), (True, "cuda:3")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=available: there)
        assert read_published(written(exp)).device == device


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("training.optimizer.learning_rate", 0, "must be above 0 and finite, got 0.0"),
        ("training.optimizer.momentum", True, "must be a number, got True"),
        ("training.optimizer.lr_drops", [60, "x"], "must be a list of whole numbers"),
        ("training.optimizer.lr_drops", [90, 60], "must be growing numbers of epochs"),
        ("training.optimizer.class", "adam", "must be 'sgd', got 'adam'"),
        ("training.optimizer.nesterov", 1, "is unknown; the fields of training.optim"),
        ("training.optimizer.momenta", 1, r"is unknown \(did you mean momentum\?\)"),
        ("training.num_steps", 160.5, "must be a whole number, got 160.5"),
        ("training.compressor", None, "must be a table of fields, got None"),
        ("training.compressor.class", "obd", "must be one of 'none', .*, got 'obd'"),
        ("training.compressor.mask", "block", "must be one of 'global', 'layer'"),
        ("training.compressor.warmup", 160, "must be below num_steps, 160, .* got 160"),
        ("training.compressor.warmup", -2, "must be at least 0, got -2"),
        ("dataset.class", "mnist", "must be one of cifar10, cifar100, .*, got 'mnist'"),
        ("model.class", "CNN500k", "must be one of resnet18, .*, got 'CNN500k'"),
        ("model.num_classes", 100, "must be 10, the classes of cifar10, got 100"),
        ("validation.metric", "loss", "must be one of 'acc', 'f1', got 'loss'"),
        ("validation.frequency", 0, "must be at least 1, got 0"),
        ("general.gpu.ngpus", 2, "must be 0 or 1, a run takes one device, got 2"),
        ("general.gpu.gpu_id", -1, "must be a whole number of at least 0, got -1"),
        ("compressor", {}, "is unknown; the fields are general, dataset, model"),
    ],
    ids=str,
)
def test_published_values_that_are_wrong(exp, written, place, value, message):
    trees.put(exp, place.replace(".", "/"), value)
    path = written(exp)
    with pytest.raises(FisherpruneError, match=f"^{path}: {place} {message}"):
        read_published(path)


def test_published_values_that_are_wrong_together(exp, written):
    exp["training"]["compressor"]["warmup"] = 60
    drops = "training.optimizer.lr_drops must be after the warm-up of 60 epochs, .* 60"
    with pytest.raises(FisherpruneError, match=drops):
        read_published(written(exp))
    exp["training"]["compressor"]["class"] = "none"
    dense = "training.compressor.sparsity must be 0 for none, .* got 0.9"
    with pytest.raises(FisherpruneError, match=dense):
        read_published(written(exp))


@pytest.mark.parametrize("place", SCHEMA)
def test_every_published_field_must_be_there_and_of_its_kind(exp, written, place):
    words = re.escape(SCHEMA[place][0].words)
    trees.put(exp, place.replace(".", "/"), [True])
    path = written(exp)
    with pytest.raises(FisherpruneError, match=f"^{path}: {place} must be {words}, go"):
        read_published(path)
    trees.put(exp, place.replace(".", "/"))
    missing = f": {place} is missing; it must be {words}$"
    with pytest.raises(FisherpruneError, match=missing):
        read_published(written(exp))


def test_every_table_of_a_published_file_is_known(exp):
    def leaves(content, path=""):
        for name, value in content.items():
            inside = isinstance(value, dict)
            yield from leaves(value, f"{path}{name}.") if inside else [f"{path}{name}"]

    assert sorted(leaves(exp)) == sorted(SCHEMA)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"general": ', "must be a JSON file: Expecting value"),
        ("[1]", r"the whole of it must be a table of fields, got \[1\]"),
        ('{"general": {"id": "a", "id": "b"}}', "field 'id' is there twice"),
        ("\ud800", "must be a JSON file"),
    ],
)
def test_files_that_are_no_published_file(written, tmp_path, text, message):
    path = tmp_path / "exp.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(FisherpruneError, match=f"^{path}: .*{message}"):
        read_published(path)
