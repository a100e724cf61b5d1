"""The timed run on a GPU, without a GPU: plan, budget, steps that fail."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, record
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import steps as gpu_run
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.measure import NotHere, row
from benchmarks.gpu.steps import Budget, Step, Unusable


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_dry_run_lists_every_step_and_fits_the_time(capsys):
    assert gpu.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    steps = gpu.plan()
    assert {s.part for s in steps} == set(gpu.PARTS)
    assert all(f"{s.name} " in text and s.what in text for s in steps)
    a_build, lent = 60, 600
    assert sum(s.seconds for s in steps) <= gpu.MINUTES * 60 <= lent - a_build
    assert {*gpu.BENCHMARKS} == {"ceilings", *gpu_rows.STEPS}


def test_parts_can_be_chosen(capsys):
    gpu.main(["--dry-run", "--only", "sanitizer,build"])
    text = capsys.readouterr().out
    assert "memcheck" in text
    assert "scoring" not in text
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tests,sleep"])
    assert "parts must be of build,tests,sanitizer,benchmarks, got sleep" in (
        capsys.readouterr().err
    )


def test_help_lists_the_parts(capsys):
    assert gpu.parse([]).only == gpu.PARTS
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    assert ",".join(gpu.PARTS) in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_there_is_one_line_and_status_2(capsys, tmp_path):
    assert gpu.main(["--output", str(tmp_path / "x.json")]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "finds no GPU" in err
    assert not list(tmp_path.iterdir())


def step(name, seconds, run=lambda s: {}, part="benchmarks"):
    return Step(part, name, seconds, "", run)


def test_a_step_gets_its_own_time_and_what_is_left_over():
    clock = Clock()
    budget, steps = Budget(100, clock), [step("a", 30), step("b", 40)]
    assert budget.grant(steps) == 60
    clock.now += 90
    assert budget.grant(steps) is None
    assert budget.grant([step("c", 10)]) == 10
    clock.now += 30
    assert budget.left() == 0


def test_what_does_not_fit_or_fails_is_listed_and_the_rest_is_written():
    clock, written = Clock(), []

    def slow(seconds):
        clock.now += 50
        return {"rows": [row("a", "s", [1.0])], "ceilings": {"copy_gbs": 2.0}}

    def broken(seconds):
        raise gpu_run.Failed(Outcome(None, "one\ntwo"))

    def wrong(seconds):
        raise ValueError("no")

    def absent(seconds):
        raise NotHere("is not installed")

    found = gpu_run.new_record({"device": "d"})
    steps = [step("slow", 40, slow), step("large", 60), step("broken", 9, broken)]
    steps += [step("wrong", 1, wrong), step("absent", 1, absent)]
    gpu_run.run(
        steps, Budget(100, clock), found, lambda r: written.append(json.dumps(r))
    )
    assert len(written) == len(steps)
    assert [r["name"] for r in json.loads(written[0])["rows"]] == ["a"]
    assert found["ceilings"] == {"copy_gbs": 2}
    assert found["not_run"] == {
        "large": "needs 60 s, 50 s are left",
        "absent": "is not installed",
    }
    assert found["failed"] == {
        "broken": {"why": "ran out of time", "tail": ["one", "two"]},
        "wrong": {"why": "ValueError('no')", "tail": []},
    }
    assert gpu_run.failures(found) == ["broken", "wrong"]
    text = gpu.report(found)
    assert "large: not run: needs 60 s" in text
    assert "broken: FAILED, ran out of time" in text


def test_a_build_that_does_not_fit_ends_the_run():
    def unusable(seconds):
        raise Unusable("old")

    with pytest.raises(Unusable):
        gpu_run.run(
            [step("build", 1, unusable)], Budget(9), gpu_run.new_record({}), print
        )


# ---- steps and their files ----


def test_a_step_writes_its_rows_or_why_there_are_none(monkeypatch, tmp_path):
    def absent(device):
        raise NotHere("needs 9 GB")

    path = tmp_path / "x.json"
    steps = {"topk": lambda device: [row(device, "s", [1.0])], "kernel": absent}
    monkeypatch.setattr(gpu_rows, "STEPS", steps)
    for name, expected in (("topk", "rows"), ("kernel", "not_run")):
        arguments = [name, "--device", "cpu", "--output", str(path)]
        gpu_rows.main(arguments)
        assert list(json.loads(path.read_text())) == [expected]


def test_rows_before_a_failure_are_kept(monkeypatch, tmp_path):
    def fails(device):
        yield row("first", "s", [1.0])
        raise RuntimeError("CUDA error")

    path = tmp_path / "x.json"
    monkeypatch.setattr(gpu_rows, "STEPS", {"topk": fails})
    with pytest.raises(RuntimeError, match="CUDA error"):
        gpu_rows.main(["topk", "--device", "cpu", "--output", str(path)])
    (found,) = json.loads(path.read_text())["rows"]
    assert found["name"] == "first"


def test_a_failed_benchmark_tells_its_last_lines_and_rows(monkeypatch):
    def fails(command, seconds):
        path = Path(command[command.index("--output") + 1])
        record.write_json(path, {"rows": [row("first", "s", [1.0])]})
        return Outcome(None, "Traceback\nCUDA error")

    monkeypatch.setattr(gpu_checks, "run_limited", fails)
    found = gpu_run.new_record({})
    gpu_run.run_step(step("topk", 9, partial(gpu.run_benchmark, "topk")), 9, found)
    assert [r["name"] for r in found["rows"]] == ["first"]
    why = {"why": "ran out of time", "tail": ["Traceback", "CUDA error"]}
    assert found["failed"] == {"topk": why}


def test_a_benchmark_that_writes_nothing_fails_too(monkeypatch):
    monkeypatch.setattr(gpu_checks, "run_limited", lambda *_: Outcome(1, "no"))
    with pytest.raises(gpu_run.Failed, match="exit 1"):
        gpu.run_benchmark("topk", 10)
