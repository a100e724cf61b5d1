"""Ctrl-C while a command is imported, and in other programs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fisherprune import startup

SOURCE = Path(startup.__file__).parents[1]
SITE = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""
"""A module that Python imports as it starts: presses Ctrl-C at an import."""


@pytest.fixture
def interrupted_at(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)

    def run(module, *command):
        path = f"{tmp_path}:{SOURCE}"
        return subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"PYTHONPATH": path, "AT": module},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize("module", ["torch", "fisherprune.trainer"])
def test_a_command_ends_silently(interrupted_at, module):
    done = interrupted_at(module, "-m", "fisherprune.train", "--epochs", "1")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_other_programs_handle_it(interrupted_at, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import fisherprune")
    (tmp_path / "other" / "go.py").write_text("raise KeyboardInterrupt")
    for command in (["-m", "other.go", "fisherprune.x"], ["-c", "import fisherprune"]):
        done = interrupted_at("fisherprune.models", *command)
        assert "KeyboardInterrupt" in done.stderr


def test_a_command_that_has_begun_hears_it_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m", "--quiet"])
    for module, silent in (("fisherprune.train", True), ("other.train", False)):
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", module, "--quiet"])
        startup.silence_interrupts()
        assert (signal.getsignal(signal.SIGINT) is signal.SIG_DFL) == silent
        startup.heed_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
