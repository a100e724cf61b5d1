"""The doctor, and kernels that do not load."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fisherprune as fp
from fisherprune import doctor, kernels
from fisherprune.sources import source_hash

PACKAGE = Path(fp.__file__).parent


def test_prints_what_is_there(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in text
    assert f"works, {kernels.cpu_capability()} kernels" in text


def test_mistakes_end_in_one_line(capsys):
    assert doctor.main(["--foo"]) == 2
    error = "fisherprune.doctor: error: unrecognized arguments: --foo\n"
    assert capsys.readouterr() == ("", error)


def run_copy(folder, *command):
    """Run a copy of the package whose kernels do not load."""
    copy = folder / "fisherprune"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / "_C.py").write_text("raise ImportError('libcudart.so.99: not found')")
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True
    )


def test_kernels_that_do_not_load_are_explained(tmp_path):
    result = run_copy(tmp_path, "-m", "fisherprune.doctor")
    assert result.returncode == 1
    assert "the compiled kernels do not load" in result.stdout
    assert "libcudart.so.99: not found" in result.stdout
    assert "reinstall with `pip install --no-build-isolation .`" in result.stdout
    assert "Traceback" not in result.stderr


def test_use_without_kernels_says_why(tmp_path):
    result = run_copy(tmp_path, "-c", "from fisherprune import score")
    assert "ImportError: fisherprune: the compiled kernels" in result.stderr


def test_kernels_of_another_cuda_are_refused():
    kernels._check_cuda_major("13.0", "13.2")
    kernels._check_cuda_major("", "12.8")
    kernels._check_cuda_major("13.0", None)
    with pytest.raises(ImportError, match="built for CUDA 13.0 but torch .* CUDA 12.8"):
        kernels._check_cuda_major("13.0", "12.8")


def test_stale_kernels_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SOURCE_HASH", "of another tree")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "fisherprune" / "doctor.py"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "x.cpp").write_text("int x;")
    report = doctor.examine()
    assert any("were not built from" in trouble for trouble in report.troubles)
    assert not report.broken


def test_kernels_that_compute_wrongly_are_reported(monkeypatch):
    monkeypatch.setattr("fisherprune.ops.grad_moments", lambda *_, **__: None)
    report = doctor.examine()
    assert report.broken
    assert any("compute wrongly on cpu" in trouble for trouble in report.troubles)


def test_source_hash_sees_every_change(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "a.cpp").write_text("int a;")
    first = source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("no source")
    assert source_hash(tmp_path) == first
    (tmp_path / "cpu" / "a.cpp").write_text("int b;")
    second = source_hash(tmp_path)
    (tmp_path / "cpu" / "a.cpp").rename(tmp_path / "cpu" / "b.cpp")
    assert len({first, second, source_hash(tmp_path)}) == 3
