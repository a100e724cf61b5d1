"""The result file of a GPU run, its report and the README's table."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu, readme, record
from benchmarks.gpu import steps as gpu_run
from benchmarks.gpu.measure import Goal, row
from benchmarks.gpu.steps import Unusable


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
    command = [sys.executable, "-m", "benchmarks.gpu.rows", "--help"]
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
    monkeypatch.setattr(
        gpu, "plan", lambda parts: [gpu_run.Step("tests", "t", 1, "", tests)]
    )
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
