"""The metrics of runs in W&B and Trackio, offline, as their own files hold them."""

import json
import struct
import sys
from dataclasses import replace

import pytest

from fisherprune.errors import FisherpruneError
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.folder import RunFolder
from fisherprune.runs.loggers import LOGGERS
from fisherprune.runs.metrics import METRIC_NAMES, Metrics
from fisherprune.train import options, run

LOSSES = (2.0, 1.5, 1.25, 1.125)


def add(folder, epoch):
    """Add an epoch, every second of which is validated."""
    train = Metrics(LOSSES[epoch - 1], **dict.fromkeys(METRIC_NAMES[1:], 0.25))
    validation = None if epoch % 2 else train
    folder.add_epoch(
        phase="train",
        epoch=epoch,
        lr=0.5,
        train=train,
        validation=validation,
        seconds=1.0,
    )


def interrupted(config, path):
    """Write three epochs, go on after two of them as after a kill; four in all."""
    with RunFolder(config, path) as folder:
        for epoch in (1, 2, 3):
            add(folder, epoch)
        rows = folder.rows[:2]
    with RunFolder(config, path) as folder:
        folder.restore_rows([dict(row) for row in rows])
        for epoch in (3, 4):
            add(folder, epoch)


def points(epochs):
    """Return what is to be shown, by epoch."""
    found = {}
    for epoch in epochs:
        values = {"lr": 0.5, "seconds": 1.0}
        for part in ("train", *["validation"] * (epoch % 2 == 0)):
            shares = dict.fromkeys(METRIC_NAMES[1:], 0.25)
            named = {"loss": LOSSES[epoch - 1]} | shares
            values |= {f"{name}/{part}": value for name, value in named.items()}
        found[epoch] = values
    return found


def records(path):
    """Yield the records of a file of wandb: a LevelDB log behind seven bytes."""
    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:  # headers do not cross blocks
            position += room
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def wandb_runs(path):
    """Return (id, project, config, {step: metrics}) of each folder, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(path.glob("wandb/offline-run-*/*.wandb")):
        steps, about = {}, None
        for data in records(file):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                config = {
                    c.key: json.loads(c.value_json) for c in record.run.config.update
                }
                about = record.run.run_id, record.run.project, config
            if record.WhichOneof("record_type") == "history":
                items = {
                    i.nested_key[0]: json.loads(i.value_json)
                    for i in record.history.item
                }
                shown = {k: v for k, v in items.items() if not k.startswith("_")}
                steps[items["_step"]] = shown
        yield *about, steps


def test_wandb_goes_on_with_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = TrainConfig(log=["wandb"], seed=7)
    interrupted(config, tmp_path / "run")
    before, after = wandb_runs(tmp_path / "run")
    assert before[0] == after[0] and before[1] == "mine"
    assert before[2]["seed"] == 7 and before[2]["method"] == "fts"
    assert before[3] == points([1, 2, 3])
    assert after[3] == points([1, 2, 3, 4])  # none twice


def test_wandb_that_has_epochs_gets_the_others(tmp_path, monkeypatch):
    wandb, sent = pytest.importorskip("wandb"), []

    class Resumed:  # as online
        step = 3

        def log(self, values, step):
            sent.append((step, values))

        def finish(self):
            sent.append("finished")

    monkeypatch.setattr(wandb, "init", lambda **options: Resumed())
    with RunFolder(TrainConfig(log=["wandb"]), tmp_path / "run") as folder:
        row = {"lr": 0.5, "epoch": 1, "phase": "train", "validation_loss": None}
        folder.restore_rows([row | {"lr": 0.1 * i} for i in range(1, 5)])
    assert sent == [(3, {"lr": 0.1 * 3}), (4, {"lr": 0.1 * 4}), "finished"]


def test_wandb_that_can_not_begin(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**options):
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", init)
    message = "wandb must be able to begin a run, but no API key; .*WANDB_MODE=offline"
    with pytest.raises(FisherpruneError, match=message):
        RunFolder(TrainConfig(log=["wandb"]), tmp_path / "run")


def test_trackio_goes_on_with_a_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [n for n in sys.modules if n.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # the folder is read when it is imported
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    own = trackio.init("own", "mine", embed=False)  # of the calling program
    capsys.readouterr()
    config = TrainConfig(log=["trackio"], seed=7)
    interrupted(config, tmp_path / "run")
    assert capsys.readouterr().out == ""
    trackio.log({"a": 1})  # goes to it
    trackio.finish()
    assert [log["a"] for log in SQLiteStorage.get_logs("own", own.name)] == [1]
    (made,) = trackio.Api().runs("fisherprune")
    assert made.name.startswith("run-") and made.config["seed"] == 7
    logs = SQLiteStorage.get_logs("fisherprune", made.name)
    found = [(log.pop("step"), log) for log in logs if log.pop("timestamp")]
    assert found == [*points([1, 2, 3, 4]).items()]  # none twice


def test_all_places_at_once_each_in_a_folder_of_its_own(tmp_path, monkeypatch):
    made = []

    class Fake:
        def __init__(self, folder, config):
            made.append([folder.name, config["method"]])

        require = staticmethod(lambda: None)

        def add(self, step, row):
            made[-1].append(step)

        def replay(self, rows):
            raise AssertionError

        def close(self):
            made[-1].append("closed")

    monkeypatch.setitem(LOGGERS, "tensorboard", Fake)
    config = TrainConfig(tensorboard=True, log=["tensorboard"], method="snip")
    with RunFolder(config, tmp_path / "a") as folder:
        add(folder, 1)
    assert made == [["a", "snip", 1, "closed"]]  # once


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_package_that_is_not_there(small, name, monkeypatch, tmp_path):
    package = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, package, None)
    message = f"{name} must be installed.*pip install {name}, or leave (it|the option)"
    with pytest.raises(FisherpruneError, match=message):
        run(replace(small, log=(name,)), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_option():
    assert options.parse(["--log", "wandb", "trackio"]).config.log == (
        "wandb",
        "trackio",
    )
    assert options.parse(["--log"]).config.loggers == ()
    both = options.parse(["--tensorboard", "--log", "wandb", "wandb"]).config
    assert set(both.loggers) == {"tensorboard", "wandb"} and len(both.loggers) == 2
    with pytest.raises(
        FisherpruneError, match="log must be some of .*, got .'neptune'"
    ):
        TrainConfig(log=("neptune",))
