import csv
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fisherprune import models
from fisherprune.errors import FisherpruneError
from fisherprune.files import check_writable
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.environment import environment
from fisherprune.runs.folder import RunFolder
from fisherprune.runs.metrics import Metrics
from fisherprune.runs.words import duration

SOURCE = Path(models.__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path):
    return TrainConfig(output_dir=str(tmp_path), dataset="digits")


def test_no_two_runs_share_a_folder(config, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: RunFolder(config).path, range(16)))
    names = {path.name for path in paths}
    assert names == {f"digits-resnet18-fts-0.9-seed0-{n}" for n in range(1, 17)}
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_each_epoch_is_a_row(config):
    folder = RunFolder(config)
    metrics = [Metrics(*(i + 0.1 * k for k in range(5))) for i in range(3)]
    for epoch, (train, validation) in enumerate(
        [(metrics[0], metrics[1]), (metrics[2], metrics[0])]
    ):
        columns = {"epoch": epoch, "lr": 0.5, "seconds": 1.0}
        folder.add_epoch(train=train, validation=validation, **columns)
    with (folder.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    for part, truth in (("train", metrics[2]), ("validation", metrics[0])):
        got = {k: float(rows[1][f"{part}_{k}"]) for k in asdict(truth)}
        assert got == asdict(truth)


def test_weights_come_back_bit_for_bit(config):
    folder, model = RunFolder(config), models.create("resnet20", seed=3)
    sha256 = folder.save_weights("last", model.state_dict())
    loaded = folder.load_weights("last", sha256)
    state = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FisherpruneError, match="output_dir must be a folder .*file/x"):
        check_writable(tmp_path / "file" / "x")
    check_writable(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


@pytest.mark.skipif(not shutil.which("git"), reason="git is not on the PATH")
def test_environment_says_where_numbers_come_from():
    facts = environment(torch.device("cpu"))
    assert facts["torch"] == torch.__version__ and facts["device"]
    command = ["git", "-C", SOURCE, "rev-parse", "--show-toplevel", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True).stdout.split()
    if answer[:1] != [str(SOURCE)]:
        pytest.skip("the package does not run from a git checkout")
    assert facts["commit"].removesuffix("+changes") == answer[1]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_no_file_holds_numbers_that_are_no_json(config, number):
    with RunFolder(config) as folder, pytest.raises(ValueError, match="not JSON"):
        folder.write_json("results.json", {"loss": number})
    assert not (folder.path / "results.json").exists()


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.97, "1:00 min"),
        (60.4, "1:00 min"),
        (3599.4, "59:59 min"),
        (3599.7, "1:00:00 h"),
        (3725, "1:02:05 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
