"""A run's files are read back as they were written, those of older versions too."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import result_trees as trees

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.folder import CONFIG, METRICS, RESULTS, read_config
from fisherprune.runs.identity import identity
from fisherprune.runs.metrics import Metrics
from fisherprune.runs.reader import FinishedRun, read_epochs, read_run
from fisherprune.runs.result import LayerCount

OLD = Path(__file__).parents[2] / "studies" / "results" / "cifar10-cpu"


@pytest.fixture
def result(tmp_path):
    return FinishedRun(
        config=TrainConfig(method="snip", skip=("bn",), epochs=3, lr_drops=(2,)),
        folder=tmp_path,
        parameters=99,
        last=Metrics(0.5, 0.25, 0.5, 0.75, 0.125),
        best=Metrics(0.75, 0.5, 0.25, 0.375, 0.625),
        best_epoch=2,
        layers=(
            LayerCount("conv1.weight", 4, 40, 80),
            LayerCount("conv2.weight", 8, 3, 8),
            LayerCount("conv3.weight", 8, 0, 10),
        ),
        scoring={"seconds": 3.5, "samples": 7, "cached": True},
        seconds={"scoring": 0.5, "training": 60.0},
        environment={"device": "x", "cpus": 2, "commit": None},
        notes=("conv1.weight is the first word of this note",),
        name="a",
    )


def written(folder, content):
    path = folder / RESULTS
    path.write_text(json.dumps(content))
    return path


def test_what_is_written_is_read_back(result, tmp_path):
    back = read_run(written(tmp_path, result.as_json()), "a")
    assert back == result
    assert back.warnings == (
        "conv1.weight is the first word of this note",
        "conv2.weight keeps 3 weights for 8 outputs: some outputs are constant",
        "conv3.weight has collapsed: none of its 10 weights kept",
    )
    assert (back.reused, back.mask_seconds) == (3.5, 4.0)
    assert back.accuracy("last") == 25 and back.accuracy("best") == 50


def test_files_of_the_first_version_tell_notes_from_warnings(result, tmp_path):
    content = result.as_json()
    del content["notes"]
    for layer in content["layers"].values():
        del layer["outputs"]
    content["warnings"][0] = "trained on two devices"
    content["test"]["last"]["loss"] = math.nan  # what the first version wrote
    back = read_run(written(tmp_path, content), "a")
    assert back.notes == ("trained on two devices",)
    assert back.collapsed == ("conv3.weight",)
    assert math.isnan(back.last.loss)
    assert back.layers == tuple(replace(x, outputs=None) for x in result.layers)


def test_the_results_of_the_repository_are_read():
    paths = sorted(OLD.glob(f"runs/*/{RESULTS}"))
    assert paths
    for path in paths:
        content, run = json.loads(path.read_text()), read_run(path, "x")
        assert path.parent.name.endswith(identity(run.config))
        assert run.config == read_config(path.parent)
        assert run.test == content["test"] and run.seconds == content["seconds"]
        assert (run.kept, run.total) == (content["kept"], content["prunable"])
        assert run.sparsity == content["sparsity"]
        assert run.scoring == content["scoring"]
        epochs = read_epochs(path.parent / METRICS)
        assert len(epochs) == run.config.epochs


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("scoring.samples", -1, r"must be a whole number in \[0, 2\^63\), got -1"),
        ("scoring.cached", 1, "must be true or false, got 1"),
        ("notes", "a", "must be a list, got 'a'"),
        ("layers.a", 3, "must be a table of fields, got 3"),
        ("config", [1], r"must be a table of fields, got \[1\]"),
        ("config.lr", None, "must be a number, got None"),
        ("config.scope", "densities", "must be"),
        ("environment", None, "must be a table of fields, got None"),
    ],
)
def test_errors_name_file_and_place(result, tmp_path, place, value, message):
    content = result.as_json()
    *tables, name = place.split(".")
    table = content
    for key in tables:
        table = table[key]
    table[name] = value
    path = written(tmp_path, content)
    field = place if value != "densities" else "config.densities"
    with pytest.raises(FieldError, match=f"^{path}: {field} {message}") as caught:
        read_run(path, "a")
    assert caught.value.field == f"{path}: {field}"


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(FisherpruneError, match="must hold config.json, but .* is miss"):
        read_config(tmp_path)
    folder = trees.add_unfinished(tmp_path, method="snip")
    assert read_config(folder).method == "snip"
    (folder / CONFIG).write_text('{"epoch": 3}')
    with pytest.raises(
        FisherpruneError, match=f"^{folder}/config.json: epoch is no fi"
    ):
        read_config(folder)
