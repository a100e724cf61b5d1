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
            LayerCount("conv1.weight", 4, 40, 80, 30),
            LayerCount("conv2.weight", 8, 3, 8, 2),
            LayerCount("conv3.weight", 8, 0, 10, 0),
        ),
        scoring={"seconds": 3.5, "samples": 7, "cached": True},
        seconds={"scoring": 0.5, "training": 60.0},
        environment={"device": "x", "cpus": 2, "commit": None},
        notes=("conv1.weight is the first word of this note",),
        flops={"dense": 500, "masked": 200},
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
    assert (back.effective, back.effective_sparsity) == (32, 66 / 98)
    assert back.flops_share == 0.4
    assert back.accuracy("last") == 25 and back.accuracy("best") == 50


def test_files_of_the_first_version_tell_notes_from_warnings(result, tmp_path):
    content = result.as_json()
    del content["notes"]
    for layer in content["layers"].values():
        del layer["outputs"], layer["effective"]
    del content["flops"], content["effective"], content["effective_sparsity"]
    content["warnings"][0] = "trained on two devices"
    content["test"]["last"]["loss"] = math.nan  # what the first version wrote
    back = read_run(written(tmp_path, content), "a")
    assert back.notes == ("trained on two devices",)
    assert back.collapsed == ("conv3.weight",)
    assert math.isnan(back.last.loss)
    assert back.layers == tuple(
        replace(x, outputs=None, effective=None) for x in result.layers
    )
    assert back.effective is back.effective_sparsity is None
    assert back.flops is back.flops_share is None


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
        epochs = read_epochs(path.parent / METRICS, run.config.epochs)
        assert len(epochs) == run.config.epochs


NO_JSON = "is no JSON: truncated, or not written by fisherprune"
HUGE = 10**400
"""More than a float can hold."""


@pytest.mark.parametrize(
    "text, message",
    [
        (b'{"form', NO_JSON),
        (b"\xff\xfe\x00", NO_JSON),
        (b'{"a": ' + b"[" * 10**5, NO_JSON),
        (b"[1]", "must be a JSON object, got [1]"),
        (b'{"a": 1}', "format must be 1, got None: not written by this version"),
    ],
)
def test_a_file_that_is_no_result(tmp_path, text, message):
    path = tmp_path / RESULTS
    path.write_bytes(text)
    with pytest.raises(FisherpruneError) as caught:
        read_run(path, "a")
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("format", 2, "must be 1, got 2: not written by this version of fisherprune"),
        ("format", True, "must be 1, got True: not written by this version of fishe"),
        ("parameters", HUGE, "must be a whole number in [0, 2^63), got 1000"),
        ("best_epoch", 4, "must be in [0, 3], the epochs of the run, got 4"),
        ("notes", "a", "must be a list, got 'a'"),
        ("environment", None, "must be a table of fields, got None"),
        ("config", [1], "must be a table of fields, got [1]"),
        ("config", math.nan, "must be a table of fields, got nan"),
        ("config/speed", 1, "is no field of a configuration"),
        ("config/lr", None, "must be a number, got None"),
        ("config/lr", -1, "must be above 0 and finite, got -1"),
        ("config/sparsity", "0.9", "must be a number, got '0.9'"),
        ("config/method", "x", "must be one of none, random"),
        ("config/lr_drops", [3, 2], "must be growing numbers of epochs"),
        ("config/densities", {"a": HUGE}, "must be finite numbers of at least 0"),
        ("config/seed", 10**100, "must be of at most 100 digits, got 1000"),
        ("test/best/accuracy", 50, "must be a number in [0, 1], got 50"),
        ("test/best/loss", HUGE, "must be a number, got 1000"),
        ("layers/a", 3, "must be a table of fields, got 3"),
        ("layers/conv1.weight", {"kept": 3, "total": 2}, "must keep from 0 to all of"),
        (
            "layers/conv1.weight/effective",
            41,
            "must be at most 40, the weights kept, g",
        ),
        ("layers/conv1.weight/effective", -1, "must be a whole number in [0, 2^63), g"),
        ("flops", 3, "must be a table of fields, got 3"),
        ("flops/masked", 501, "must be at most 500, those of the dense network, got 5"),
        ("flops/dense", 1.5, "must be a whole number in [0, 2^63), got 1.5"),
        ("layers", {}, "must hold at least one layer, got {}"),
        ("seconds/training", HUGE, "must be a number of at most 3.5e+38, got 1000"),
        ("seconds/training", 1e308, "must be a number of at most 3.5e+38, got 1e+308"),
        ("seconds/training", [1, 2], "must be a number of at most 3.5e+38, got [1, 2]"),
        ("seconds/scoring", math.nan, "must be a number of at most 3.5e+38, got nan"),
        ("scoring/seconds", 1e308, "must be a number of at most 3.5e+38, got 1e+308"),
        ("scoring/samples", -1, "must be a whole number in [0, 2^63), got -1"),
        ("scoring/cached", 1, "must be true or false, got 1"),
        *(
            (place, None, "is missing; it must be ")
            for place in ("seconds", "test/last", "test/best/f1", "config")
        ),
    ],
    ids=str,
)
def test_errors_name_file_and_place(result, tmp_path, place, value, message):
    content = result.as_json()
    trees.put(content, place, *([] if "missing" in message else [value]))
    path = written(tmp_path, content)
    with pytest.raises(FisherpruneError) as caught:
        read_run(path, "a")
    field = place.replace("/", ".")
    assert str(caught.value).startswith(f"{path}: {field} {message}")


def test_an_error_carries_its_place(result, tmp_path):
    path = written(tmp_path, result.as_json() | {"notes": 3})
    with pytest.raises(FieldError) as caught:
        read_run(path, "a")
    assert caught.value.field == f"{path}: notes" and caught.value.got == "3"


def test_warnings_of_the_first_version_are_a_list(result, tmp_path):
    content = result.as_json() | {"warnings": "x"}
    del content["notes"]
    with pytest.raises(FieldError, match="warnings must be a list, got 'x'"):
        read_run(written(tmp_path, content), "a")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "a,b\n",
        "a,b\n1,2\n",
        "phase,epoch\n",
        "phase,epoch,train_loss\ntrain,1\n",
        "x" * 200_000,
        f"phase,epoch,train_loss,validation_accuracy\ntrain,1,{'x' * 200_000},1\n",
    ],
)
def test_a_table_of_something_else(text, tmp_path):
    path = tmp_path / METRICS
    path.write_text(text)
    message = f"^{path} is no table of epochs: truncated, or not written by fisherprune"
    with pytest.raises(FisherpruneError, match=message):
        read_epochs(path, 160)


@pytest.mark.parametrize(
    "row, message",
    [
        ("161,1,1", "epoch must be in 1, 2, ..., 160, got 161.0"),
        (",1,1", "epoch must be in 1, 2, ..., 160, got None"),
        ("1,,1", "train_loss must be at most 3.5e+38, infinite or not a number, got N"),
        ("1,1e308,1", "train_loss must be at most 3.5e+38, infinite or not a number,"),
        ("1,1,50", "validation_accuracy must be in [0, 1], got 50.0"),
        ("1,nan,1", None),
        ("160,inf,", None),
    ],
)
def test_values_that_no_epoch_can_have(row, message, tmp_path):
    path = tmp_path / METRICS
    path.write_text(f"phase,epoch,train_loss,validation_accuracy\ntrain,{row}\n")
    if message is None:
        assert len(read_epochs(path, 160)) == 1
        return
    with pytest.raises(FieldError) as caught:
        read_epochs(path, 160)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(FisherpruneError, match="must hold config.json, but .* is miss"):
        read_config(tmp_path)
    folder = trees.add_unfinished(tmp_path, method="snip")
    assert read_config(folder).method == "snip"
    (folder / CONFIG).write_text('{"epochs": "3"}')
    message = f"^{folder}/config.json: epochs must be a whole number, got '3'$"
    with pytest.raises(FieldError, match=message):
        read_config(folder)
    (folder / CONFIG).write_text('{"epoch": 3}')
    with pytest.raises(
        FisherpruneError, match=f"^{folder}/config.json: epoch is no fi"
    ):
        read_config(folder)
