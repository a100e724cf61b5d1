"""Runs of a network that a user's function builds."""

import json
import shutil
from dataclasses import replace

import pytest
from trainings import stopped

from fisherprune import train
from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.experiments.study import read_study
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.folder import read_config
from fisherprune.runs.identity import identity
from fisherprune.runs.reader import read_run
from fisherprune.train.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
from torch import nn

def small(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes),
    )
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets" / "own.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


@pytest.fixture
def own(small, file):
    return replace(small, model=f"{file}:small", sparsity=0.5)


def test_a_run_of_a_model_of_ones_own(own, file, tmp_path):
    result = train.run(own, quiet=True)
    assert list(result.folder.parent.iterdir()) == [result.folder]
    assert "own.py-small-fts-0.5-seed0-1" in result.folder.name
    saved = json.loads((result.folder / "config.json").read_text())
    assert saved["model_source"] == own.model_source is not None
    file.unlink()  # as on another machine: what is finished is read without it
    assert read_config(result.folder) == own
    assert read_run(result.folder / "results.json", "a").config == own


def test_other_source_is_another_run(own, file):
    before = identity(own)
    assert identity(TrainConfig(**{**vars(own), "model_source": None})) == before
    file.write_text(SOURCE.replace("4", "5"))
    assert identity(TrainConfig(**{**vars(own), "model_source": None})) != before


def test_ours_and_torchvisions_have_no_source(small):
    assert small.model_source is None
    assert TrainConfig(model="torchvision:resnet18").model_source is None


def test_a_run_whose_source_has_changed_is_not_resumed(own, file, tmp_path, mistake):
    folder = tmp_path / "run"
    stopped(own, folder)
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    file.write_text(SOURCE.replace("4", "5"))
    err = mistake(main, "--resume", folder, "--quiet")
    source = f"model must be of the source {own.model_source} that the run began with"
    assert f"{source}, got {own.model} of the source " in err
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint
    file.write_text(SOURCE)
    assert main(["--resume", str(folder), "--quiet"]) == 0


def test_a_study_of_a_model_of_ones_own(file, tmp_path):
    study = tmp_path / "s.toml"
    study.write_text(f"name = 'a'\n[run]\nmodel = '{file}:small'\n")
    (run,) = read_study(study).runs
    assert run.model_source is not None
    shutil.rmtree(file.parent)
    with pytest.raises(FieldError, match=f"^{study}: run.model must be a func"):
        read_study(study)
    study.write_text("name = 'a'\n[run]\nmodel_source = 'abc'\n")
    with pytest.raises(FisherpruneError, match="run.model_source is unknown"):
        read_study(study)


def test_the_help_says_what_is_hashed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "The file that defines it is hashed, and the hash is a part of the" in text
