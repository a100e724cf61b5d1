"""What the tests of studies share."""

import json
from pathlib import Path

import pytest
from small_study import STUDY, Trained

from fisherprune.experiments import execute
from fisherprune.experiments.__main__ import main
from fisherprune.experiments.plan import Overrides, Plan
from fisherprune.runs import locks

REFERENCE = Path(__file__).parents[2] / "studies" / "reference" / "fts.json"


@pytest.fixture
def trained(monkeypatch):
    """Return what was trained, and how."""
    fake = Trained([], {})
    monkeypatch.setattr(execute.train, "run", fake.run)
    monkeypatch.setattr(locks, "POLL", 0.001)
    return fake


@pytest.fixture
def batch(tmp_path):
    """Return what gives a command with a small study."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "small.toml").write_text(STUDY)

    def run(*options, command="run"):
        paths = ["--output", str(tmp_path / "out"), "--device", "cpu"]
        return main([command, str(tmp_path / "studies"), *paths, *options])

    return run


@pytest.fixture
def runs(tmp_path, batch):
    """Return the runs of the small study, by method."""
    plan = Plan([tmp_path / "studies"], Overrides(tmp_path / "out", "cpu"))
    return {run.config.method: run for run in plan.runs}


@pytest.fixture
def exp():
    """Return the content of a file of the published schema."""
    return json.loads((REFERENCE).read_text())


@pytest.fixture
def written(tmp_path):
    def write(content, name="exp.json"):
        path = tmp_path / name
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text)
        return path

    return write
