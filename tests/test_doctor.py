"""The doctor, and kernels that do not load."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fisherprune as fp
from fisherprune import doctor, ops
from fisherprune.ops import kernels, reference
from fisherprune.ops.sources import source_hash

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


def as_tf32(x):
    """Round to ten bits behind the point, as the tensor cores take their operands."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_kernels_that_round_to_tf32_are_right(monkeypatch):
    off = []

    def rounded(input, grad, *sums, **options):
        truth = [torch.zeros_like(s) for s in sums]
        reference.grad_moments(input, grad, *truth, **options)
        reference.grad_moments(as_tf32(input), as_tf32(grad), *sums, **options)
        pairs = zip(sums, truth, strict=True)
        off.append(max(((s - t) / t).abs().max().item() for s, t in pairs))

    monkeypatch.setattr("fisherprune.ops.grad_moments", rounded)
    report = doctor.Report()
    assert doctor._try_kernels(report, "cpu") == "works"
    assert not report.broken
    assert off[0] > 1e-2  # of the smallest entries, which the norm does not see


@pytest.mark.parametrize("wrong", [0, 1])
def test_moments_that_are_slightly_wrong_are_reported(wrong, monkeypatch):
    def scaled(input, grad, *sums, **options):
        reference.grad_moments(input, grad, *sums, **options)
        sums[wrong].mul_(1.01)

    monkeypatch.setattr("fisherprune.ops.grad_moments", scaled)
    report = doctor.Report()
    assert doctor._try_kernels(report, "cpu") == "broken"
    assert "compute wrongly on cpu" in report.troubles[0]


def test_masks_of_the_right_size_in_the_wrong_place_are_reported(monkeypatch):
    right = ops.global_topk

    def smallest(scores, keep):
        return right([-s for s in scores], keep)

    monkeypatch.setattr("fisherprune.ops.global_topk", smallest)
    report = doctor.Report()
    assert doctor._try_kernels(report, "cpu") == "broken"
    assert "compute wrongly on cpu" in report.troubles[0]


def test_every_dependency_is_looked_for():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    names = set(re.findall(r'^ *"([\w-]+)', listed[1], re.MULTILINE))
    if sys.version_info >= (3, 11):
        names.remove("tomli")
    assert set(doctor.PACKAGES) == names


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
