"""The GPU benchmarks without a GPU: plan, budget, records, commands, and tiny runs."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from benchmarks import (
    gpu,
    gpu_cases,
    gpu_checks,
    gpu_kernels,
    gpu_measure,
    gpu_networks,
    gpu_rows,
    gpu_run,
    harness,
    moments,
    readme,
    record,
)
from benchmarks.gpu_checks import Outcome
from benchmarks.gpu_measure import Goal, NotHere, row
from benchmarks.gpu_run import Budget, Step, Unusable
from fisherprune import kernels


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# ---- plan and budget ----


def test_dry_run_lists_every_step_and_fits_the_time(capsys):
    assert gpu.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    steps = gpu.plan()
    assert {s.part for s in steps} == set(gpu.PARTS)
    assert all(f"{s.name} " in text and s.what in text for s in steps)
    assert sum(s.seconds for s in steps) <= 9 * 60
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


# ---- rows ----


@pytest.mark.parametrize(
    ("goal", "samples", "holds", "target"),
    [
        (Goal(2, aim=0.8), [1.0, 3.0, 2.0], True, "<= 2"),
        (Goal(2), [1.0, 3.0, 2.1], False, "<= 2"),
        (Goal(0.35, at_most=False), [0.34, 0.36, 0.35], True, ">= 0.35"),
        (Goal(100, at_most=False), [99.0], False, ">= 100"),
    ],
)
def test_rows_are_judged_by_their_median(goal, samples, holds, target):
    found = row("a", "x", samples, goal, more=1)
    assert (found["holds"], found["target"], found["n"]) == (
        holds,
        target,
        len(samples),
    )
    assert found["q1"] <= found["value"] <= found["q3"]
    assert found.get("aim") == goal.aim
    assert found["more"] == 1
    assert "target" not in row("a", "x", samples)


def test_precision_is_put_back_after_an_error():
    before = torch.backends.cudnn.conv.fp32_precision
    with pytest.raises(KeyError), gpu_measure.precision("tf32"):
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        raise KeyError
    assert torch.backends.cudnn.conv.fp32_precision == before


# ---- build, tests, sanitizer ----


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        ("8.0;9.0+PTX", (9, 0), True),
        ("8.0;9.0+PTX", (8, 6), True),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0;9.0", (12, 0), False),
        ("8.0;9.0+PTX", (7, 5), False),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("7.5 10.0", (10, 3), True),
        ("", (9, 0), False),
    ],
)
def test_architectures(archs, capability, covered):
    assert gpu_checks.covers(archs, capability) == covered


def test_faults_of_the_build_are_named(monkeypatch):
    monkeypatch.setattr(gpu_checks, "source_hash", lambda path: "now")
    monkeypatch.setattr(kernels, "SOURCE_HASH", "then")
    monkeypatch.setattr(kernels, "CUDA_VERSION", "")
    without, stale = gpu_checks.build_facts((9, 0))["faults"]
    assert "built without CUDA" in without
    assert "must be built from csrc/ as it is (now), they are from then" in stale
    monkeypatch.setattr(kernels, "CUDA_VERSION", "13.0")
    monkeypatch.setattr(kernels, "CUDA_ARCHS", "8.0")
    assert (
        "must cover compute capability 9.0, they are built for 8.0"
        in (gpu_checks.build_facts((9, 0))["faults"][0])
    )
    monkeypatch.setattr(kernels, "SOURCE_HASH", "now")
    assert gpu_checks.build_facts((8, 6))["faults"] == []


def test_a_command_is_ended_with_its_children():
    child = "import time; print('begun', flush=True); time.sleep(60)"
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    )
    outcome = gpu_checks.run_limited([sys.executable, "-c", parent], 2)
    assert (outcome.status, outcome.output) == (None, "begun\n")
    script = "import os; print(os.environ['HERE']); raise SystemExit(3)"
    outcome = gpu_checks.run_limited([sys.executable, "-c", script], 60, {"HERE": "x"})
    assert (outcome.ending, outcome.tail) == ("exit 3", ["x"])


def test_results_of_pytest_are_counted(tmp_path):
    path = tmp_path / "test_a.py"
    path.write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "@pytest.mark.parametrize('x', ['PASSED b', 2])\n"
        "def test_b(x): assert x == 2\n"
        "@pytest.mark.skip\n"
        "def test_c(): pass\n"
    )
    command = gpu_checks.pytest_command()
    command = command[: -len(gpu_checks.TESTS)] + [str(path)]
    outcome = gpu_checks.run_limited(command, 100)
    found = gpu_checks.pytest_result(outcome)
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert (found["ok"], found["ended"]) == (False, "exit 1")
    assert found["tail"]


def test_sanitizer_commands():
    for tool in gpu_checks.TOOLS:
        command = gpu_checks.sanitizer_command("/bin/cs", tool)
        assert command[:3] == ["/bin/cs", "--tool", tool]
        assert command[-2:] == ["-m", "benchmarks.gpu_cases"]
        filtered = "kns=fisherprune" in command
        assert filtered == (tool != "initcheck")
    assert (gpu_checks.ROOT / "benchmarks" / "gpu_cases.py").exists()


@pytest.mark.parametrize(
    ("status", "output", "found", "ok"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", 0, True),
        (9, "========= ERROR SUMMARY: 1 error", 1, False),
        (0, "= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        (
            0,
            "= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)",
            2,
            False,
        ),
        (1, "========= ERROR SUMMARY: 0 errors", 0, False),
        (0, "no summary", None, False),
        (None, "", None, False),
    ],
)
def test_sanitizer_results(status, output, found, ok):
    result = gpu_checks.sanitizer_result(Outcome(status, output))
    assert (result["found"], result["ok"]) == (found, ok)


def test_a_sanitizer_is_found_or_missed_aloud(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_checks.glob, "glob", lambda pattern: [])
    with pytest.raises(NotHere, match="compute-sanitizer is not installed"):
        gpu_checks.find_sanitizer()
    program = tmp_path / "compute-sanitizer"
    program.touch(mode=0o755)
    monkeypatch.setattr(gpu_checks.glob, "glob", lambda pattern: [str(program)])
    assert gpu_checks.find_sanitizer() == str(program)


# ---- the measurements, on the CPU with tiny sizes ----


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(harness, "LEAST_MS", 0.01)


def names(rows):
    assert all(r["n"] >= 1 and r["value"] == r["value"] for r in rows)
    return [r["name"] for r in rows]


def test_small_cases_hold_on_the_cpu(capsys):
    gpu_cases.main(["--device", "cpu"])
    assert "right" in capsys.readouterr().out


def test_rates(short):
    found = gpu_measure.limits("cpu", n=64, megabytes=1)
    assert list(found) == [
        *("fp32_matmul_tflops", "tf32_matmul_tflops", "bf16_matmul_tflops"),
        *("copy_gbs", "read_gbs"),
    ]
    assert all(0 < value < 1e4 for value in found.values())


@pytest.fixture
def small_network(short, monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=5), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    ).eval()
    monkeypatch.setattr(gpu_networks.end_to_end, "network", lambda *_: model)


def test_networks(small_network):
    found = gpu_networks.scoring("cpu", "net", 11, 4, looped=2, rounds=1)
    assert names(found)[0].startswith("net, 11 images: exact fts scores")
    assert found[0]["error"] < 1e-5
    assert found[1]["value"] / found[0]["value"] == pytest.approx(found[2]["value"])
    assert len(gpu_networks.passes("cpu", "net", 2, rounds=1)) == 3
    assert len(gpu_networks.memory("cpu", "net", 2, rounds=1)) == 2


def test_wrong_scores_are_not_timed(small_network, monkeypatch):
    right = gpu_networks.fp.score
    monkeypatch.setattr(
        gpu_networks.fp,
        "score",
        lambda *a: {n: s * 1.1 for n, s in right(*a).items()},
    )
    with pytest.raises(harness.WrongResult, match="scores"):
        gpu_networks.scoring("cpu", "net", 3, 2, looped=1, rounds=1)


def test_kernels(short):
    layers = gpu_kernels.largest_layers()
    assert [str(la) for la in layers] == [
        *("conv3x3 64-64 at 32", "conv3x3 128-128 at 16", "conv3x3 256-256 at 8"),
        *("conv3x3 512-512 at 4", "conv3x3 512-512 at 2"),
    ]
    small = [moments.Layer(3, 5, 6)]
    (found,) = gpu_kernels.kernel("cpu", 4, small, n=64, rounds=2)
    assert found["n"] == 2
    assert found["value"] * found["matmul_tflops"] == pytest.approx(found["tflops"])
    assert len(gpu_kernels.selection("cpu", 20_000, rounds=2)) == 4
    (found,) = gpu_kernels.large_selection("cpu", 1 << 16, megabytes=1, rounds=2)
    assert found["value"] > 0


def test_scattered_scores_have_every_rank_once():
    scores = torch.cat(gpu_kernels.scattered_scores(1 << 16, "cpu"))
    ranks = scores.view(torch.int32) - gpu_kernels.topk.LEAST_BITS
    assert torch.equal(ranks.sort().values, torch.arange(1 << 16, dtype=torch.int32))
    assert scores.isfinite().all()


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


def test_a_failed_benchmark_tells_its_last_lines(monkeypatch):
    monkeypatch.setattr(
        gpu_checks, "run_limited", lambda *_: Outcome(1, "Traceback\nCUDA error")
    )
    with pytest.raises(gpu_run.Failed, match="exit 1") as failed:
        gpu.run_benchmark("topk", 10)
    assert failed.value.tail == ["Traceback", "CUDA error"]


# ---- the result file and the README ----


def made_up(source_hash):
    place = {"device": "NVIDIA X1 (80GB)", "torch": "9.9", "commit": "abc"}
    found = gpu_run.new_record(place | {"source_hash": source_hash})
    found["rows"] = [
        row("small", "s", [1.5], Goal(2)),
        row("large", "us", [12345.0], Goal(150)),
        row("plain", "MB", [3.0]),
    ]
    found["tests"] = {"counts": {"passed": 7}, "ended": "exit 0", "ok": True}
    found["sanitizer"] = {
        "memcheck": {"found": 0, "ended": "exit 0", "ok": True},
        "racecheck": {"found": None, "ended": "ran out of time", "ok": False},
    }
    found["not_run"] = {"topk-large": "needs 12 GB"}
    return found


def test_slug():
    assert gpu.slug("NVIDIA X1 (80GB)") == "nvidia-x1-80gb"


def test_report_and_failures_of_a_record():
    found = made_up("x")
    assert gpu_run.failures(found) == ["racecheck"]
    text = gpu.report(found)
    assert "tests: ok, exit 0, {'passed': 7}" in text
    assert "racecheck: FAILED, ran out of time" in text
    assert "NO" in text.splitlines()[2]
    found["tests"]["ok"] = False
    assert gpu_run.failures(found) == ["tests", "racecheck"]


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    return tmp_path


TEXT = "before\n<!-- gpu -->\nNone yet.\n<!-- /gpu -->\nafter\n"


def test_readme_keeps_its_words_without_results(results):
    assert readme.filled(TEXT) == TEXT
    assert "<!-- gpu -->" in readme.README.read_text()


def test_readme_shows_the_numbers_and_their_age(results, monkeypatch):
    monkeypatch.setattr(readme, "source_hash", lambda path: "now")
    record.write_json(results / "gpu-nvidia-x1.json", made_up("now"))
    text = readme.filled(TEXT)
    assert "| NVIDIA X1 (80GB) | measured | target | holds |" in text
    assert "| small | 1.5 s | <= 2 | yes |" in text
    assert "| large | 12,345 us | <= 150 | **no** |" in text
    assert "| plain | 3 MB |  |  |" in text
    assert "Tests on it: 7 passed." in text
    assert "memcheck found: 0.\nracecheck found: ran out of time." in text
    assert "Without result: topk-large." in text
    assert text.startswith("before\n<!-- gpu -->\n")
    assert text.endswith("<!-- /gpu -->\nafter\n")
    assert "None yet" not in text
    assert "older kernels" not in text
    assert readme.filled(text) == text
    record.write_json(results / "gpu-nvidia-x1.json", made_up("then"))
    assert "older kernels: sources then, now now" in readme.filled(TEXT)


def test_modules_run_as_programs():
    """As the steps call them; without a device they must fail, not hang."""
    command = [sys.executable, "-m", "benchmarks.gpu_rows", "--help"]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, check=True)
    assert b"--output" in done.stdout


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1), (None, 2)])
def test_the_whole_run_writes_its_file(ok, status, monkeypatch, tmp_path, capsys):
    def tests(seconds):
        if ok is None:
            raise Unusable("stale\nother device")
        return {"tests": {"counts": {"passed": 1}, "ended": "exit 0", "ok": ok}}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "plan", lambda parts: [step("t", 1, tests)])
    monkeypatch.setattr(
        gpu, "place_of", lambda commit: {"device": "A B", "commit": commit}
    )
    assert gpu.main(["--commit", "abc"]) == status
    out, err = capsys.readouterr()
    if ok is None:
        assert [line.split(": ")[1] for line in err.splitlines()] == [
            *("stale", "other device")
        ]
        assert not list(tmp_path.iterdir())
    else:
        (path,) = tmp_path.iterdir()
        found = json.loads(path.read_text())
        assert path.name == "gpu-a-b.json"
        assert found["environment"]["commit"] == "abc"
        assert found["tests"]["ok"] == ok
        assert str(path) in out
