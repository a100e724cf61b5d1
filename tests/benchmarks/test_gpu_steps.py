"""The timed run on a GPU, without a GPU: steps, limits, failures, files."""

import json
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import record
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, steps
from benchmarks.gpu.measure import NotHere, row
from benchmarks.gpu.steps import Step

# ---- the command line ----


def test_dry_run_lists_every_step_with_its_limit_and_fits_the_time(capsys):
    assert gpu.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for step in [steps.BUILD, *steps.DEFAULT]:
        (line,) = (x for x in lines if x.startswith(f"{step.name} "))
        assert line.split()[1] == f"{step.seconds:g}" and line.endswith(step.what)
    total = sum(s.seconds for s in [steps.BUILD, *steps.DEFAULT])
    a_build, lent = 60, 600
    assert total <= gpu.MINUTES * 60 <= lent - a_build
    assert lines[-1] == f"{total} s at most, of 9 minutes"


def test_steps_can_be_chosen(capsys):
    chosen = ["--steps", "sanitizers", "memory", "memcheck", "build"]
    assert gpu.main(["--dry-run", *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert [x.split()[0] for x in lines[1:-1]] == ["build", *tools, "memory"]


@pytest.mark.parametrize("group", steps.GROUPS)
def test_a_group_of_steps_fits_a_call(group):
    total = sum(step.seconds for step in [steps.BUILD, *steps.GROUPS[group]])
    assert total <= gpu.MINUTES * 60


def test_the_tests_are_there():
    assert all(Path(record.ROOT, path).exists() for path in checks.TESTS)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--steps tests sleep", "argument --steps: must be one of default, .* 'sleep'"),
        ("--minutes 0", "argument --minutes: must be a number above 0, got '0'"),
        ("--minutes nan", "argument --minutes: must be a number above 0, got 'nan'"),
        ("--minutes x", "argument --minutes: must be a number, got 'x'"),
        ("--only tests", "unrecognized arguments: --only tests"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_started(
    command, message, capsys, monkeypatch
):
    monkeypatch.setattr(gpu, "run_step", None)
    assert gpu.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert re.match(f"python -m benchmarks.gpu: error: {message}$", err)
    assert (out, err.count("\n")) == ("", 1)


def test_help_lists_the_steps(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    text = "".join(capsys.readouterr().out.split())  # lines end behind hyphens, too
    assert ",".join([*steps.GROUPS, *steps.STEPS]) in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_there_is_one_line_and_status_2(capsys, tmp_path):
    assert gpu.main(["--output", str(tmp_path / "x.json")]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "finds no GPU" in err
    assert not list(tmp_path.iterdir())


# ---- the whole run ----

ROW = row("a", "s", [1.0])
PLACE = {"environment": {"device": "NVIDIA X1 (80GB)", "commit": None}}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend that there is a GPU; steps find and end as ``outcomes`` says."""
    outcomes = {"build": (PLACE, gpu.Outcome(0, ""))}

    def run_limited(command, seconds):
        assert command[:3] == [sys.executable, "-m", "benchmarks.gpu.steps"]
        name = command[3]
        assert seconds == steps.STEPS[name].seconds
        found, outcome = outcomes[name]
        if found is not None:
            record.write_json(command[command.index("--output") + 1], found)
        return outcome

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "run_limited", run_limited)
    return outcomes


def test_a_step_that_fails_is_named_and_the_others_run(machine, tmp_path, capsys):
    machine["tests"] = {"tests": {"counts": {"failed": 1}}}, gpu.Outcome(1, "E  no")
    machine["topk"] = {"rows": [ROW]}, gpu.Outcome(None, "one\ntwo")
    machine["kernel"] = None, gpu.Outcome(-11, "")
    machine["scoring"] = {"rows": [row("b", "s", [2.0])]}, gpu.Outcome(0, "")
    machine["memory"] = {"not_run": {"memory": "needs 9 GB"}}, gpu.Outcome(0, "")
    chosen = ["tests", "topk", "kernel", "scoring", "memory"]
    path = tmp_path / "x.json"
    command = ["--steps", *chosen, "--output", str(path), "--commit", "abc"]
    assert gpu.main(command) == 1
    found = json.loads(path.read_text())
    assert found["environment"]["commit"] == "abc"
    assert [r["name"] for r in found["rows"]] == ["a", "b"]
    assert found["tests"] == {"counts": {"failed": 1}}
    assert found["not_run"] == {"memory": "needs 9 GB"}
    assert found["failed"] == {
        "tests": {"why": "exit 1", "tail": ["E  no"]},
        "topk": {"why": "ran out of time", "tail": ["one", "two"]},
        "kernel": {"why": "exit -11", "tail": []},
    }
    assert list(found["seconds"]) == ["build", *chosen]
    out = capsys.readouterr().out
    assert "topk: FAILED, ran out of time\n    one\n    two\n" in out
    assert str(path) in out


def test_results_are_written_after_every_step(machine, tmp_path, monkeypatch):
    path, run_limited, seen = tmp_path / "x.json", gpu.run_limited, []

    def killed(command, seconds):
        if command[3] == "scoring":
            raise KeyboardInterrupt
        if path.exists():
            seen.append(json.loads(path.read_text())["rows"])
        return run_limited(command, seconds)

    machine["topk"] = {"rows": [ROW]}, gpu.Outcome(0, "")
    machine["kernel"] = {"rows": [ROW]}, gpu.Outcome(0, "")
    monkeypatch.setattr(gpu, "run_limited", killed)
    command = ["--steps", "topk", "kernel", "scoring", "--output", str(path)]
    assert gpu.main(command) == 130
    assert seen == [[ROW]]
    assert json.loads(path.read_text())["rows"] == [ROW, ROW]


def test_what_does_not_fit_into_the_time_is_not_started(machine, tmp_path, capsys):
    machine["memory"] = {"rows": [ROW]}, gpu.Outcome(0, "")
    path = tmp_path / "x.json"
    command = ["--minutes", "2", "--steps", "tests", "memory", "--output", str(path)]
    assert gpu.main(command) == 0
    found = json.loads(path.read_text())
    assert found["rows"] == [ROW]
    assert found["not_run"]["tests"].startswith("needs 180 s, ")
    assert "tests: not run: needs 180 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outcome", "lines"),
    [
        (gpu.Outcome(1, "stale\nother device\n"), ["exit 1", "stale", "other device"]),
        (gpu.Outcome(None, ""), ["ran out of time"]),
    ],
)
def test_a_build_that_does_not_fit_ends_the_run(
    outcome, lines, machine, tmp_path, capsys
):
    machine["build"] = PLACE, outcome
    assert gpu.main([]) == 2
    err = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[-1] for line in err] == lines
    assert not list(tmp_path.iterdir())


def test_chosen_steps_replace_no_other_results(machine, tmp_path):
    machine["topk"] = {"rows": [ROW]}, gpu.Outcome(0, "")
    assert gpu.main(["--steps", "topk"]) == 0
    for step in steps.DEFAULT:
        machine[step.name] = {}, gpu.Outcome(0, "")
    assert gpu.main([]) == 0
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["gpu-nvidia-x1-80gb-topk.json", "gpu-nvidia-x1-80gb.json"]


# ---- a step's process ----


def test_a_command_that_runs_out_of_time_is_ended_with_its_children(
    tmp_path, monkeypatch
):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = "import os, time; print('begun', flush=True); "
    child += f"os.write(os.open({str(fifo)!r}, os.O_WRONLY), b'x'); time.sleep(600)"
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    )
    opened = []

    class RunsOutOfTime(subprocess.Popen):
        """Once the child has begun."""

        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            opened.append(os.open(fifo, os.O_RDONLY))
            assert os.read(opened[0], 1) == b"x"
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", RunsOutOfTime)
    outcome = gpu.run_limited([sys.executable, "-c", parent], 1e9)
    assert (outcome.status, outcome.output) == (None, "begun\n")
    ended, _, _ = select.select(opened, [], [], 300)
    assert ended and os.read(opened[0], 1) == b""  # nobody can write any more
    os.close(opened[0])


def test_a_command_tells_its_status_and_last_lines():
    script = f"print('x\\n' * {gpu.TAIL + 5}); raise SystemExit(3)"
    outcome = gpu.run_limited([sys.executable, "-c", script], 600)
    assert (outcome.ending, len(outcome.tail)) == ("exit 3", gpu.TAIL)


def run_alone(monkeypatch, path, run):
    monkeypatch.setitem(steps.STEPS, "topk", Step("topk", 1, "", run))
    return steps.main(["topk", "--device", "cpu", "--output", str(path)])


def test_a_step_writes_its_rows_or_why_there_are_none(monkeypatch, tmp_path):
    def absent(device):
        yield row(device, "s", [1.0])
        raise NotHere("needs 9 GB")

    path = tmp_path / "x.json"
    assert run_alone(monkeypatch, path, steps.rows(absent)) == 0
    found = json.loads(path.read_text())
    assert [r["name"] for r in found.pop("rows")] == ["cpu"]
    assert found == {"not_run": {"topk": "needs 9 GB"}}


def test_rows_before_a_failure_are_kept(monkeypatch, tmp_path):
    def fails(device):
        yield row("first", "s", [1.0])
        raise RuntimeError("CUDA error")

    path = tmp_path / "x.json"
    with pytest.raises(RuntimeError, match="CUDA error"):
        run_alone(monkeypatch, path, steps.rows(fails))
    (found,) = json.loads(path.read_text())["rows"]
    assert found["name"] == "first"


def test_steps_are_a_program():
    command = [sys.executable, "-m", "benchmarks.gpu.steps", "sleep"]
    done = subprocess.run(
        command, cwd=record.ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    program = "python -m benchmarks.gpu.steps: error: "
    assert done.stderr.startswith(f"{program}argument step: must be one of build, ")
    assert Path(record.ROOT, "benchmarks", "gpu", "cases.py").exists()
