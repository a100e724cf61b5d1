import re
from pathlib import Path

import pytest

from fisherprune.errors import FisherpruneError
from fisherprune.experiments import store
from fisherprune.experiments.__main__ import main
from fisherprune.experiments.execute import Options
from fisherprune.experiments.executors.ray import Needs, Ray, fitting
from fisherprune.experiments.plan import Overrides, Plan

ray = pytest.importorskip("ray")
NETWORK = f"{Path(__file__).parents[1]}/support/train_ranks_job.py:small"
STUDY = """
name = "tiny"
[run]
dataset = "digits"
model = "resnet20"
device = "cpu"
train_samples = 32
score_samples = 8
lr_drops = []
epochs = 1
[grid]
method = ["none", "fts", "random"]
"""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = ["tiny.toml", "--output", "out"]  # a worker must find it from elsewhere
    return ["run", *places, "--executor", "ray", "--quiet"]


def test_a_study_on_ray(command, tmp_path, capsys):
    (tmp_path / "tiny.toml").write_text(STUDY)
    folder = STUDY.replace('"digits"', '"folder"').replace('"none", ', "")
    (tmp_path / "wrong.toml").write_text(folder.replace("32", "33"))
    assert main([*command[:2], "wrong.toml", *command[2:]]) == 1
    text = capsys.readouterr().out
    assert len(re.findall(r"\]\s\S+: finished, test accuracy", text)) == 3
    assert "2  failed" in text and "data" in text
    plan = Plan([tmp_path / "tiny.toml"], Overrides(tmp_path / "out"))
    assert [store.state(run) for run in plan.runs] == ["finished"] * 3
    assert list((tmp_path / "out" / "locks").iterdir()) == []  # all swept
    assert main(command) == 0
    assert "3  finished before" in capsys.readouterr().out
    assert main([*command, "--shard", "1/2"]) == 0
    part = sum(int(run.identity, 16) % 2 == 0 for run in plan.runs)
    assert f"\n{part} runs of shard 1/2 in " in capsys.readouterr().out


@pytest.mark.parametrize("lost", [0, 1])
def test_ctrl_c_cancels_what_runs(lost, command, tmp_path, monkeypatch, capsys):
    cancel, seen = ray.cancel, []
    grace = "fisherprune.experiments.executors.ray.GRACE"

    def lossy(ref, **options):
        seen.append(options)
        monkeypatch.setattr(grace, 100.0 if len(seen) > lost else 0.1)
        if len(seen) > lost:
            cancel(ref, **options)

    monkeypatch.setattr(ray, "cancel", lossy)
    endless = STUDY.replace("epochs = 1", "epochs = 100000")
    (tmp_path / "tiny.toml").write_text(endless.replace('"none", "fts", ', ""))
    wait = Ray.wait

    def interrupted(self):
        if list(tmp_path.glob("out/runs/*/checkpoint.pt")):
            raise KeyboardInterrupt
        return wait(self)

    monkeypatch.setattr(Ray, "wait", interrupted)
    assert main(command) == 130
    (run,) = Plan([tmp_path / "tiny.toml"], Overrides(tmp_path / "out")).runs
    assert store.state(run) == "resumable"
    assert list(run.locks.iterdir()) == []
    assert len(seen) > lost and not any(seen)


def test_what_no_machine_has(command):
    with pytest.raises(FisherpruneError, match="must have the 99 CPUs and 0 GPUs of a"):
        Ray(Options(), gpus=0, cpus=99)
    with pytest.raises(FisherpruneError, match="must have the 1 CPUs and 0.5 GPUs of"):
        Ray(Options(), gpus=0.5)


@pytest.mark.parametrize(
    "cpus, gpus, share, slots",
    [(16, 4, 1, 4), (16, 4, 0.5, 8), (16, 4, 0.4, 8), (2, 4, 1, 2), (16, 4, 2, 2)]
    + [(16, 0, 0, 16), (16, 0, 1, 0)],
)
def test_how_many_runs_fit_on_a_machine(cpus, gpus, share, slots):
    assert fitting(cpus, gpus, 1, share) == slots


@pytest.mark.parametrize(
    "given, processes, needs",
    [
        (Needs(None, None, True), 1, (1, 1)),
        (Needs(None, None, True), 4, (4, 4)),
        (Needs(None, None, False), 4, (4, 0)),
        (Needs(0.5, 2, True), 1, (2, 0.5)),
        (Needs(0, None, True), 2, (2, 0)),
        (Needs(4, 16, True), 4, (16, 4)),
    ],
)
def test_what_a_run_of_several_processes_is_given(given, processes, needs):
    assert given.of(processes) == needs


def test_runs_of_several_processes(command, tmp_path, capsys):
    study = STUDY.replace('"none", "fts", "random"', '"snip"')
    study = study.replace('model = "resnet20"', f'model = "{NETWORK}"')
    (tmp_path / "tiny.toml").write_text(study + "processes = [2, 3]\n")
    assert main(command) == 1  # the machine of the tests has two CPUs
    text = capsys.readouterr().out
    assert len(re.findall(r"\]\s\S+: finished, test accuracy", text)) == 1
    assert "must have the 3 CPUs and 0 GPUs of a run, none has" in text
    plan = Plan([tmp_path / "tiny.toml"], Overrides(tmp_path / "out"))
    assert [store.state(run) for run in plan.runs] == ["finished", "failed"]
    assert store.read_results(plan.runs[0]).environment["processes"] == 2


@pytest.mark.parametrize(
    "gpus, processes, message",
    [
        ("2", "1", "--gpus-per-run must be at most 1 for a run of 1 processes"),
        ("1", "2", "--gpus-per-run must be 2 for a run of 2 processes, each of which"),
        ("0.5", "2", "--gpus-per-run must be 2 for a run of 2 processes, each of wh"),
    ],
)
def test_gpus_are_as_many_as_processes(
    gpus, processes, message, command, tmp_path, mistake
):
    (tmp_path / "tiny.toml").write_text(STUDY)
    options = ["--gpus-per-run", gpus, "--processes", processes]
    assert message in mistake(main, *command, *options)
