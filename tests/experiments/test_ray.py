import re

import pytest

from fisherprune.errors import FisherpruneError
from fisherprune.experiments import store
from fisherprune.experiments.__main__ import main
from fisherprune.experiments.execute import Options
from fisherprune.experiments.executors.ray import Ray, fitting
from fisherprune.experiments.plan import Overrides, Plan

ray = pytest.importorskip("ray")
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
