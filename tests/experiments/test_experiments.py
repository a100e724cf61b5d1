import errno
import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import result_trees as trees
import torch
from PIL import Image

from fisherprune.errors import FisherpruneError
from fisherprune.experiments import __main__ as cli
from fisherprune.experiments import estimate, execute, store
from fisherprune.experiments import leases as locks
from fisherprune.experiments.execute import Options, attempt
from fisherprune.experiments.leases import Lock, Watch
from fisherprune.experiments.plan import Overrides, Plan
from fisherprune.runs.environment import device_name
from fisherprune.runs.identity import identity

REFERENCE = Path(__file__).parents[2] / "studies" / "reference"
STUDY = """
name = "small"
[run]
dataset = "digits"
epochs = 4
[grid]
method = ["none", "snip", "fts"]
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Trained:
    """Stands in for fisherprune.train.run: writes a result at once."""

    done: list
    before: dict
    """What happens first, by method."""
    seconds: float = 6.0

    def run(self, config, *, folder, statistics, quiet, checkpointed):
        assert statistics is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(config)))
        self.before.get(config.method, lambda *_: None)(folder, checkpointed)
        result = trees.result(
            config,
            0.5,
            seconds={"training": self.seconds},
            environment={"device": device_name(torch.device("cpu"))},
        )
        for name in store.WEIGHTS:
            (folder / name).touch()
        (folder / "results.json").write_text(json.dumps(result))
        self.done.append(config.method)
        return SimpleNamespace(best=SimpleNamespace(accuracy=0.5))


@pytest.fixture
def trained(monkeypatch):
    fake = Trained([], {})
    monkeypatch.setattr(execute.train, "run", fake.run)
    monkeypatch.setattr(locks, "POLL", 0.001)
    return fake


@pytest.fixture
def batch(tmp_path):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "small.toml").write_text(STUDY)

    def run(*options, command="run"):
        paths = ["--output", str(tmp_path / "out"), "--device", "cpu"]
        return cli.main([command, str(tmp_path / "studies"), *paths, *options])

    return run


@pytest.fixture
def runs(tmp_path, batch):
    plan = Plan([tmp_path / "studies"], Overrides(tmp_path / "out", "cpu"))
    return {run.config.method: run for run in plan.runs}


def fail(error):
    def failing(*_):
        raise error

    return failing


def test_what_is_finished_is_never_done_again(trained, batch, runs, capsys):
    assert batch() == 0
    assert trained.done == ["none", "snip", "fts"]
    text = capsys.readouterr().out
    assert f"[3/3] {runs['fts'].name}: finished, test accuracy 50.00 %" in text
    assert f"python -m fisherprune.report {runs['fts'].results}" in text
    before = {p: p.read_bytes() for p in runs["fts"].results.rglob("*.json")}
    assert batch() == 0
    assert trained.done == ["none", "snip", "fts"]
    assert "3  finished before" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in runs["fts"].results.rglob("*.json")} == before
    assert list(runs["fts"].locks.iterdir()) == []


def test_weights_go_unless_they_are_to_be_kept(trained, batch, runs):
    assert batch("--keep-weights") == 0
    assert (runs["fts"].folder / "best.safetensors").exists()
    shutil.rmtree(runs["fts"].folder)
    assert batch() == 0
    assert not (runs["fts"].folder / "best.safetensors").exists()
    assert (runs["snip"].folder / "best.safetensors").exists()  # finished: untouched


def test_a_failed_run_is_recorded_and_tried_again(trained, batch, runs, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "last.safetensors")
    trained.before = {
        "none": fail(FisherpruneError("no such\ndata")),
        "snip": fail(full),
    }
    assert batch() == 1
    assert trained.done == ["fts"]
    said = json.loads((runs["none"].folder / "error.json").read_text())
    assert said["error"] == "no such data"
    assert "in failing" in said["traceback"] and "T" in said["time"]
    said = json.loads((runs["snip"].folder / "error.json").read_text())["error"]
    assert said == "OSError: [Errno 28] No space left on device: 'last.safetensors'"
    assert f"{runs['snip'].name}: {said}" in capsys.readouterr().out
    assert [store.state(run) for run in runs.values()] == [
        "failed",
        "failed",
        "finished",
    ]
    trained.before = {}
    assert batch() == 0
    assert trained.done == ["fts", "none", "snip"]
    assert not (runs["none"].folder / "error.json").exists()


def test_a_disk_too_full_for_the_error_does_not_end_the_batch(
    trained, batch, runs, monkeypatch, capsys
):
    trained.before = {"none": fail(ValueError("bad"))}
    real = store.write_text

    def full(path, text):
        if path.name == "error.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, text)

    monkeypatch.setattr(store, "write_text", full)
    assert batch() == 1
    assert trained.done == ["snip", "fts"]
    assert "bad (and error.json can't be written: No space" in capsys.readouterr().out


def damaged(change):
    def spoil(run):
        path = run.folder / "results.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda r: (r.folder / "results.json").write_text('{"form'),
            "is no JSON: truncated",
        ),
        (
            lambda r: (r.folder / "results.json").write_text("[1]"),
            "must be a JSON obje",
        ),
        (damaged(lambda c: c.pop("format")), "format must be 1, got None"),
        (damaged(lambda c: c["config"].update(seed=9)), "config must be that of run"),
        (
            damaged(lambda c: c["config"].update(new=9)),
            "config.new is no field of a configuration",
        ),
        (damaged(lambda c: c["config"].update(lr=-1)), "config.lr must be above 0"),
        (damaged(lambda c: c["test"].pop("best")), "test.best is missing"),
        (
            damaged(lambda c: c["test"]["best"].update(loss=10**400)),
            "test.best.loss must be a number, got 1000",
        ),
        (
            damaged(lambda c: c["seconds"].update(training=10**400)),
            "seconds.training must be a finite number, got 1000",
        ),
        (
            damaged(lambda c: c["config"].update(densities={"a": 10**400})),
            "config.densities must be ",
        ),
        (damaged(lambda c: c.pop("seconds")), "seconds is missing"),
    ],
)
def test_damaged_results_are_told_and_left_alone(
    trained, batch, runs, capsys, spoil, message
):
    assert batch() == 0
    shutil.rmtree(runs["fts"].folder)
    path = runs["snip"].folder / "results.json"
    spoil(runs["snip"])
    before = path.read_bytes()
    assert batch() == 1
    text = capsys.readouterr().out
    assert f"{path}: {message}" in text and "move the run's folder away" in text
    assert path.read_bytes() == before
    assert trained.done[3:] == ["fts"]
    assert batch(command="status") == 0
    assert f"damaged: {path}" in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"seed": 3}', '{"se'])
def test_a_folder_of_another_run_is_not_touched(trained, batch, runs, capsys, text):
    path = runs["snip"].folder / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert batch() == 1
    assert f"{path}: " in capsys.readouterr().out
    assert path.read_text() == text and trained.done == ["none", "fts"]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"format": 2}', "format must be 1, got 2: these are results of another ver"),
        ("results", "is no JSON: truncated"),
    ],
)
def test_results_of_another_version_are_left_alone(
    trained, batch, tmp_path, capsys, text, message
):
    mark = tmp_path / "out" / "fisherprune-results.json"
    mark.parent.mkdir()
    mark.write_text(text)
    assert batch() == 2
    assert f"error: {mark}: {message}" in capsys.readouterr().err
    assert trained.done == [] and [p.name for p in mark.parent.iterdir()] == [mark.name]


def test_files_put_into_the_folder_join(trained, batch, tmp_path, capsys):
    late, broken = tmp_path / "studies" / "late.toml", tmp_path / "studies" / "no.toml"

    def arrive(*_):
        late.write_text(STUDY.replace('"none", "snip", "fts"', '"grasp"'))
        broken.write_text("[run")

    trained.before = {"fts": arrive}
    assert batch() == 1
    assert trained.done == ["none", "snip", "fts", "grasp"]
    text = capsys.readouterr().out
    assert text.count(f"left out: {broken}: must be a TOML file") == 2  # and at the end
    broken.unlink()
    assert batch() == 0


def test_nothing_starts_before_all_files_are_valid(trained, batch, tmp_path, capsys):
    (tmp_path / "studies" / "z.toml").write_text("[run")
    assert batch() == 2
    assert trained.done == [] and not (tmp_path / "out").exists()
    assert "experiments: error: " in capsys.readouterr().err


def test_ctrl_c_ends_the_run_and_gives_its_lock_back(trained, batch, runs, capsys):
    trained.before = {"snip": fail(KeyboardInterrupt())}
    assert batch() == 130
    assert trained.done == ["none"]
    assert Watch(runs["snip"].locks, runs["snip"].identity).left()
    text = capsys.readouterr().out
    assert "interrupted; the same command goes on" in text and "2  left undone" in text
    assert not (runs["snip"].folder / "error.json").exists()
    trained.before = {}
    assert batch() == 0


def test_a_run_that_is_locked_is_left_to_its_holder(trained, batch, runs, capsys):
    run = runs["none"]
    other = Lock(run.locks, run.identity, 1)
    assert other.claim()

    def finish(*_):  # while this process does the last of the others
        (run.folder).mkdir()
        result = json.loads((runs["snip"].folder / "results.json").read_text())
        result["config"] = asdict(run.config)
        (run.folder / "results.json").write_text(json.dumps(result))
        other.release(done=True)

    trained.before = {"fts": finish}
    assert batch() == 0
    assert trained.done == ["snip", "fts"]
    assert f"{run.name}: process " in capsys.readouterr().out


def test_a_run_that_failed_in_another_process_is_not_tried_again(trained, batch, runs):
    run = runs["none"]
    other = Lock(run.locks, run.identity, 1)
    assert other.claim()

    def give_up(*_):
        store.write_failure(run, FisherpruneError("no data"))
        other.release()

    trained.before = {"fts": give_up}
    assert batch() == 1
    assert trained.done == ["snip", "fts"]


def test_a_lost_lock_ends_the_run_without_a_trace(trained, runs):
    run = runs["fts"]
    store.make_folder(run.results)

    def lose(folder, checkpointed):
        checkpointed()
        assert Lock(run.locks, run.identity, 2).claim()
        checkpointed()

    trained.before = {"fts": lose}
    assert attempt(run, 1, Options()).kind == "locked"
    assert trained.done == [] and store.state(run) == "new"


def test_what_a_killed_process_left_of_a_finished_run_is_tidied(trained, batch, runs):
    assert batch("--keep-weights") == 0
    run = runs["fts"]
    lock = Lock(run.locks, run.identity, 1)
    assert lock.claim()
    lock.release()  # as if it were gone
    (run.folder / ".checkpoint.pt.x1").touch()
    assert batch() == 0
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "config.json",
        "results.json",
    ]
    assert list(run.locks.iterdir()) == [] and len(trained.done) == 3


def test_max_minutes_starts_nothing_that_would_not_fit(
    trained, batch, capsys, tmp_path
):
    trained.seconds = 90.0
    assert batch("--max-minutes", "1") == 1
    assert trained.done == ["none"]  # nobody knows yet how long it takes
    text = capsys.readouterr().out
    assert "2  left undone" in text
    assert "needs about 1:30 min, " in text and " are left" in text
    assert batch("--max-minutes", "2") == 0
    longer = STUDY.replace("epochs = 4", "epochs = 8").replace('"none", ', "")
    (tmp_path / "studies" / "small.toml").write_text(longer)
    assert batch("--max-minutes", "2") == 1
    assert "needs about 3:00 min" in capsys.readouterr().out


def test_an_interrupted_run_needs_less(trained, batch, runs):
    assert estimate.seconds_needed(runs["fts"]) is None
    assert batch() == 0
    run = runs["fts"]
    assert estimate.seconds_needed(run) == 6.0
    (run.folder / "checkpoint.pt").touch()
    (run.folder / "metrics.csv").write_text("epoch\n1\n2\n3\n")
    assert estimate.seconds_needed(run) == 1.5


@pytest.mark.parametrize(
    "change",
    [
        {"amp": True},
        {"compile": True},
        {"memory_format": "contiguous"},
        {"validation_every": 2},
    ],
)
def test_runs_whose_epochs_take_another_time_tell_nothing(trained, batch, runs, change):
    assert batch() == 0
    other = replace(runs["fts"], config=replace(runs["fts"].config, **change))
    assert estimate.seconds_needed(other) is None


def test_numbers_that_nothing_can_hold_tell_nothing(trained, batch, runs):
    assert batch() == 0
    damaged(lambda c: c["config"].update(epochs=10**400))(runs["none"])
    damaged(lambda c: c["seconds"].update(training=10**400))(runs["snip"])
    assert estimate.seconds_needed(runs["fts"]) == 6.0


def test_a_dry_run_lists_and_makes_nothing(trained, batch, runs, tmp_path, capsys):
    assert batch("--dry-run") == 0
    assert "3 runs: 3 new" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    trained.before = {"none": fail(ValueError())}
    assert batch() == 1
    shutil.rmtree(runs["fts"].folder)
    runs["fts"].folder.mkdir()
    (runs["fts"].folder / "checkpoint.pt").touch()
    lock = Lock(runs["fts"].locks, runs["fts"].identity, 1)
    capsys.readouterr()
    assert batch(command="status") == 0
    text = capsys.readouterr().out
    assert f"{runs['fts'].name}  resumable" in text
    assert "3 runs: 1 failed, 1 finished, 1 resumable" in text
    assert lock.claim()
    assert batch(command="status") == 0
    assert f"{runs['fts'].name}  running" in capsys.readouterr().out
    lock.release()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max-minutes", "0"], "--max-minutes: must be above 0, got 0"),
        (["--max-minutes", "abc"], "--max-minutes: must be a number, got 'abc'"),
        (["--gpus-per-run", "abc"], "--gpus-per-run: must be a number, got 'abc'"),
        (["--output="], "--output: must be a path, got ''"),
        (
            ["--gpus-per-run", "0.5"],
            "--gpus-per-run and --cpus-per-run are for --execu",
        ),
        (
            ["--executor", "ray", "--gpus-per-run", "1.5"],
            "must be a fraction in .0, 1.",
        ),
        (["--executor", "slurm"], "must be one of local, ray, got 'slurm'"),
        (["--device", "gpu"], "device must be auto, cpu, cuda or cuda:INDEX, got"),
    ],
)
def test_mistakes_on_the_command_line(trained, batch, capsys, arguments, message):
    assert batch(*arguments) == 2
    assert message.replace(".0, 1.", "[0, 1]") in capsys.readouterr().err
    assert trained.done == []


def test_ray_that_is_not_installed(trained, batch, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert batch("--executor", "ray") == 2
    assert "pip install 'fisherprune[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["status"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "PATH" in out or not command
    assert max(map(len, out.splitlines())) <= 88


def test_identity_is_that_of_the_run_not_of_its_circumstances(runs):
    config = runs["fts"].config
    assert identity(replace(config, device="auto", data_dir="x")) == identity(config)
    assert identity(replace(config, batch_size=16)) == identity(config)
    assert identity(replace(config, lr=1)) == identity(replace(config, lr=1.0))
    assert identity(replace(config, seed=1)) != identity(config)
    there, here = (replace(config, dataset="folder", data_dir=d) for d in "xy")
    assert identity(there) != identity(here)


@pytest.fixture
def pictures(tmp_path):
    """Return a folder of ten classes of a few small images."""
    for part, number in (("train", 5), ("test", 1)):
        for label in range(10):
            folder = tmp_path / "pictures" / part / str(label)
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "pictures"


def test_the_ten_published_files_run(tmp_path, pictures):
    (tmp_path / "configs").mkdir()
    for path in REFERENCE.glob("*.json"):  # as they are, but for size
        content = json.loads(path.read_text())
        content["dataset"]["class"] = "folder"
        content["model"]["class"] = "ResNet20"
        content["training"]["num_steps"] = 1
        (tmp_path / "configs" / path.name).write_text(json.dumps(content))
    output = tmp_path / "out"
    places = ["--output", str(output), "--data-dir", str(pictures)]
    assert cli.main(["run", str(tmp_path / "configs"), *places, "--quiet"]) == 0
    results = [json.loads(p.read_text()) for p in output.glob("runs/*/results.json")]
    assert len(results) == 10
    for result in results:
        wanted = 0 if result["config"]["method"] == "none" else 0.9
        assert math.isclose(result["sparsity"], wanted, abs_tol=1e-2)
