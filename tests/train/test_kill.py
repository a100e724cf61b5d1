"""Studies whose processes are killed, and studies that processes share."""

import csv
import json
import random
import re
import time

import pytest
from zygote import zygote

STUDY = """
name = "tiny"
[run]
dataset = "digits"
model = "resnet20"
device = "cpu"
train_samples = 48
score_samples = 12
warmup_epochs = 1
epochs = 2
[grid]
seed = [0, 1]
method = ["none", "fts", "grasp"]
"""
RUNS = 6
KILLS = 20


@pytest.fixture(scope="module")
def children():
    with zygote() as it:
        yield it


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return path


def command(study, output):
    return ["run", study, "--output", output, "--quiet", "--keep-weights"]


def essence(results):
    """Return all that a study's runs came to, without what clocks and machines say."""
    found = {}
    for folder in sorted((results / "runs").iterdir()):
        result = json.loads((folder / "results.json").read_text())
        for name in ("seconds", "environment", "scoring"):
            result.pop(name, None)
        result["config"].pop("output_dir")
        with (folder / "metrics.csv").open() as file:
            rows = [row | {"seconds": None} for row in csv.DictReader(file)]
        tensors = {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
        found[folder.name] = (result, rows, tensors)
    return found


def progress(results):
    """Return something that changes whenever a checkpoint or a result is written."""
    files = results.glob("runs/*/*")
    return {(p, p.stat().st_mtime_ns) for p in files if p.suffix in (".pt", ".json")}


def end(children, study, output, log, **kwargs):
    pid = children.start(command(study, output), log, **kwargs)
    code = children.wait(pid, 300)
    assert code is not None, log.read_text()
    return code


def killed(children, study, output, log, chance, scale):
    """Start the study and kill it at some moment; return whether it was killed."""
    if chance.random() < 0.4:  # at a change of a file
        operations = chance.randrange(int(60 * scale))
        return end(children, study, output, log, operations=operations) == -9
    pid = children.start(command(study, output), log)
    code = children.wait(pid, chance.uniform(0, 0.7 * scale))
    if code is None:
        code = children.kill(pid)
    assert code in (0, -9), log.read_text()
    return code == -9


def test_a_study_killed_at_random_moments_ends_as_one_that_was_not(
    children, study, tmp_path
):
    log = tmp_path / "log"
    assert end(children, study, tmp_path / "calm", log) == 0, log.read_text()
    expected = essence(tmp_path / "calm")
    assert len(expected) == RUNS
    seed = time.time_ns()
    print(f"random.Random({seed})")
    chance, kills, round_ = random.Random(seed), 0, 0
    while kills < KILLS:
        round_ += 1
        output, scale = tmp_path / f"killed{round_}", 1.0
        before = None
        while killed(children, study, output, log, chance, scale):
            kills += 1
            now = progress(output)
            scale = 1.0 if now != before else 1.5 * scale  # it must get somewhere
            before = now
        assert end(children, study, output, log) == 0, log.read_text()
        assert essence(output) == expected
    assert not list((output / "locks").iterdir())


def finished(log):
    return re.findall(r"(\S+): finished", log.read_text())


def test_two_processes_share_a_study(children, study, tmp_path):
    logs = [tmp_path / "log1", tmp_path / "log2"]
    pids = [children.start(command(study, tmp_path / "out"), log) for log in logs]
    for pid, log in zip(pids, logs, strict=True):
        assert children.wait(pid, 120) == 0, log.read_text()
    done = finished(logs[0]) + finished(logs[1])
    assert len(done) == len(set(done)) == RUNS
    assert finished(logs[0]) and finished(logs[1])


def test_a_process_takes_over_the_run_of_one_that_was_killed(children, study, tmp_path):
    output, logs = tmp_path / "out", [tmp_path / "log1", tmp_path / "log2"]
    first = children.start(command(study, output), logs[0])
    while not list(output.glob("runs/*/checkpoint.pt")):
        assert children.wait(first, 0.01) is None, logs[0].read_text()
    second = children.start(command(study, output), logs[1])
    assert children.wait(second, 0.3) is None
    children.kill(first)
    assert children.wait(second, 120) == 0, logs[1].read_text()
    assert len(essence(output)) == RUNS
    done = finished(logs[0]) + finished(logs[1])
    assert len(set(done)) == len(done)  # the killed one may have said too little
