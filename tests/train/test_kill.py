"""Studies whose processes are killed, and studies that processes share."""

import csv
import json
import os
import random
import re
import signal
import time

import pytest
from trainings import without_step_times
from zygote import state, zygote

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
method = ["none", "fts"]
"""
RUNS = 4
KILLS = 8
LIMIT = 300
"""Seconds after which a test fails that waits for a process."""


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
        without_step_times(result)
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
    code = children.wait(pid, LIMIT)
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


@pytest.fixture(scope="module")
def calm(children, tmp_path_factory):
    """Return what a study comes to that is left in peace."""
    folder = tmp_path_factory.mktemp("calm")
    study, log = folder / "tiny.toml", folder / "log"
    study.write_text(STUDY)
    assert end(children, study, folder / "out", log) == 0, log.read_text()
    found = essence(folder / "out")
    assert len(found) == RUNS
    return found


def test_a_study_killed_at_random_moments_ends_as_one_that_was_not(
    children, study, calm, tmp_path
):
    log = tmp_path / "log"
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
        assert essence(output) == calm
    assert not list((output / "locks").iterdir())


def finished(log):
    return re.findall(r"(\S+): finished", log.read_text())


def until(found, log):
    """Wait until something is found; return it."""
    end = time.monotonic() + LIMIT
    while not (it := found()):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.002)
    return it


def stopped_in_a_run(pid, output, log):
    """Stop a process that holds the lock of a run alone; return the run's folder."""

    def stop():
        os.kill(pid, signal.SIGSTOP)
        until(lambda: state(pid) == "T", log)
        runs = [path.parent for path in output.glob("runs/*/checkpoint.pt")]
        held = [path.stem for path in output.glob("locks/*")]
        if [run.name.rpartition("-")[2] for run in runs] == held != []:
            return runs[0]
        os.kill(pid, signal.SIGCONT)

    return until(stop, log)


@pytest.mark.parametrize("end", ["go on", "be killed"])
def test_a_run_stays_with_its_process_until_that_ends(
    children, study, calm, tmp_path, end
):
    output, logs = tmp_path / "out", [tmp_path / "log1", tmp_path / "log2"]
    first = children.start(command(study, output), logs[0])
    run = stopped_in_a_run(first, output, logs[0])
    second = children.start(command(study, output), logs[1])

    def done():
        return finished(logs[0]) + finished(logs[1])

    until(lambda: len(done()) == RUNS - 1, logs[1])
    until(lambda: f"{run.name}: process {first} on" in logs[1].read_text(), logs[1])
    assert children.wait(second, 0) is None
    if end == "go on":
        os.kill(first, signal.SIGCONT)
        assert children.wait(first, LIMIT) == 0, logs[0].read_text()
    else:
        children.kill(first)
    assert children.wait(second, LIMIT) == 0, logs[1].read_text()
    assert sorted(done()) == sorted(calm)
    assert (run.name in finished(logs[0])) == (end == "go on")
    assert essence(output) == calm
    assert not list((output / "locks").iterdir())
