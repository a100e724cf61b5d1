"""The README's Python code runs as it stands, and passes a strict type checker."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fisherprune.data import IMAGE_SIZES

ROOT = Path(__file__).parents[1]
ELSEWHERE = {*IMAGE_SIZES} - {"digits"}
"""The data sets whose images are not in an installed package: downloaded, or files."""


def needs_files(block):
    """Return whether code names a data set that a machine without a network lacks."""
    texts = (node.value for node in ast.walk(ast.parse(block)) if is_text(node))
    return any(text in ELSEWHERE for text in texts)


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.fixture
def blocks():
    """Return the blocks in their order: later ones use the names of former ones."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert found
    return found


def run(script, blocks, *command):
    script.write_text("\n".join(blocks), encoding="utf-8")
    return subprocess.run(
        [sys.executable, *command, script],
        cwd=script.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_code_runs(blocks, tmp_path):
    done = run(tmp_path / "readme.py", [b for b in blocks if not needs_files(b)])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "block, needs",
    [("load('cifar10')", True), ("load('digits')", False), ("x = cifar10", False)],
)
def test_what_needs_files(block, needs):
    assert needs_files(block) is needs


def test_the_code_is_typed_strictly(blocks, tmp_path):
    pytest.importorskip("mypy")
    options = "--strict", "--follow-imports=silent", "--config-file="
    cache = f"--cache-dir={tmp_path}"
    done = run(tmp_path / "readme.py", blocks, "-m", "mypy", *options, cache)
    assert done.returncode == 0, done.stdout
