"""The README's Python code passes a strict type checker."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert blocks
    path = tmp_path / "readme.py"
    path.write_text("\n".join(blocks), encoding="utf-8")
    return path


def run(*args, folder=ROOT):
    return subprocess.run(
        [sys.executable, *args], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_code_is_typed_strictly(script):
    pytest.importorskip("mypy")
    options = "--strict", "--follow-imports=silent", "--config-file="
    done = run("-m", "mypy", *options, f"--cache-dir={script.parent}", script)
    assert done.returncode == 0, done.stdout
