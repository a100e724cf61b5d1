"""The doctor, and kernels that do not load."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fisherprune as fp
from fisherprune import doctor
from fisherprune.ops import kernels, reference
from fisherprune.ops.sources import source_hash

PACKAGE = Path(fp.__file__).parent
KERNELS = Path(kernels.PATH)
MODULE = Path(sys.modules["fisherprune._C"].__file__)
START = "fisherprune: the compiled kernels (fisherprune._C) do not load beside torch"


def test_prints_what_is_there(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in text
    assert f"works, {kernels.cpu_capability()} kernels" in text


def test_mistakes_end_in_one_line(capsys):
    assert doctor.main(["--foo"]) == 2
    error = "fisherprune.doctor: error: unrecognized arguments: --foo\n"
    assert capsys.readouterr() == ("", error)


def run_copy(folder, *command, files=()):
    """Run a copy of the package with other kernels: files' bytes, text, or a link."""
    copy = folder / "fisherprune"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, content in dict(files).items():
        if isinstance(content, Path):
            (copy / name).symlink_to(content)
        else:
            data = content.encode() if isinstance(content, str) else content
            (copy / name).write_bytes(data)
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True
    )


LIBRARY = {KERNELS.name: KERNELS}
BROKEN = LIBRARY | {"_C.py": "raise ImportError('libcudart.so.99: no file')"}


def test_kernels_that_do_not_load_are_explained(tmp_path):
    result = run_copy(tmp_path, "-m", "fisherprune.doctor", files=BROKEN)
    assert result.returncode == 1
    assert "the compiled kernels do not load" in result.stdout
    assert "libcudart.so.99: no file" in result.stdout
    assert "reinstall with `pip install --no-build-isolation .`" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("bytes_left", [1000, 0.99])
@pytest.mark.parametrize("cut", [KERNELS, MODULE], ids=["library", "module"])
def test_kernels_that_were_cut_short_are_explained(tmp_path, cut, bytes_left):
    """To load them would kill the process."""
    whole = cut.read_bytes()
    if whole[:4] != b"\x7fELF":
        pytest.skip("the kernels are no ELF file")
    size = bytes_left if bytes_left > 1 else int(len(whole) * bytes_left)
    files = {KERNELS.name: KERNELS, MODULE.name: MODULE} | {cut.name: whole[:size]}
    result = run_copy(tmp_path, "-c", "import fisherprune.ops", files=files)
    assert result.returncode == 1
    reason = f"{cut.name} was cut short: it has {size} of {len(whole)} bytes; reinstall"
    assert reason in result.stderr


def test_use_without_kernels_says_why(tmp_path):
    result = run_copy(tmp_path, "-c", "from fisherprune import score", files=BROKEN)
    assert f"ImportError: {START}" in result.stderr
    script = "import fisherprune as fp; print(fp.__version__); fp.prune"
    result = run_copy(tmp_path / "again", "-c", script, files=BROKEN)
    assert result.stdout == f"{fp.__version__}\n" and START in result.stderr


def test_a_module_without_its_library_is_explained(tmp_path):
    files = {MODULE.name: MODULE}
    result = run_copy(tmp_path, "-c", "from fisherprune import score", files=files)
    place = tmp_path / "fisherprune" / KERNELS.name
    assert f"No such file or directory: '{place}'" in result.stderr
    assert f"ImportError: {START}" in result.stderr


def test_without_kernels_those_of_the_installed_package_are_used(tmp_path):
    script = (
        "import sys; sys.path.append({!r})\nimport fisherprune\n"
        "from fisherprune.ops import kernels as k\n"
        "print(k.PATH, k.__file__, fisherprune.score.__module__)"
    )
    script = script.format(str(KERNELS.parents[1]))
    result = run_copy(tmp_path, "-c", script)
    here = tmp_path / "fisherprune" / "ops" / "kernels.py"
    assert result.stdout == f"{KERNELS} {here} fisherprune.scoring.score\n"


NOTHING_INSTALLED = (
    "import os, sys, torch\n"
    "paths = [p for p in sys.path[1:] if not os.path.isdir(p + '/fisherprune')]\n"
    "sys.path[1:] = paths; import fisherprune.ops"
)


def test_without_any_kernels_it_is_said(tmp_path):
    result = run_copy(tmp_path, "-c", NOTHING_INSTALLED)
    place = tmp_path / "fisherprune"
    assert f"{START} " in result.stderr
    assert f"there are none in {place}, and none are installed; rein" in result.stderr


def test_kernels_for_other_pythons_are_explained(tmp_path):
    module = {"_C.cpython-39-x86_64-linux-gnu.so": MODULE}
    result = run_copy(tmp_path, "-c", NOTHING_INSTALLED, files=LIBRARY | module)
    words = f"those in {tmp_path / 'fisherprune'} are for other Pythons than "
    assert f"{words}{platform.python_version()}; reinstall with" in result.stderr


@pytest.mark.parametrize(
    "built, runs, fits",
    [("13.0", "13.2", True), ("", "12.8", True), ("13.0", None, True)]
    + [("13.0", "12.8", False)],
)
def test_kernels_of_another_cuda_are_refused(tmp_path, built, runs, fits):
    facts = ("cuda_archs", "torch_version", "compiler", "source_hash")
    module = f"cuda_version = {built!r}\n" + "\n".join(f"{f} = 'x'" for f in facts)
    script = f"import torch; torch.version.cuda = {runs!r}; import fisherprune.ops"
    files = LIBRARY | {"_C.py": module}
    result = run_copy(tmp_path, "-c", script, files=files)
    words = "the kernels are built for CUDA 13.0 but torch .* runs on CUDA 12.8"
    assert (result.returncode == 0) == fits
    assert bool(re.search(f"ImportError: fisherprune: {words}", result.stderr)) != fits


def test_stale_kernels_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SOURCE_HASH", "of another tree")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "fisherprune" / "doctor.py"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "x.cpp").write_text("int x;")
    report = doctor.examine()
    assert any("were not built from" in trouble for trouble in report.troubles)
    assert not report.broken


@pytest.mark.parametrize(
    ("archs", "value", "line"),
    [
        ("8.0;9.0+PTX", "1", "not built: TORCH_CUDA_ARCH_LIST had no 9.0a"),
        ("8.0;9.0;9.0a", None, "built, off: FISHERPRUNE_CUDA_WGMMA is not 1"),
        ("9.0a", "1", "built, on"),
    ],
)
def test_the_kernel_of_warpgroup_products_is_reported(archs, value, line, monkeypatch):
    monkeypatch.setattr(kernels, "CUDA_VERSION", "13.0")
    monkeypatch.setattr(kernels, "CUDA_ARCHS", archs)
    monkeypatch.delenv("FISHERPRUNE_CUDA_WGMMA", raising=False)
    if value:
        monkeypatch.setenv("FISHERPRUNE_CUDA_WGMMA", value)
    assert f"  wgmma kernel   {line}" in doctor.examine().lines


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
    assert not doctor.examine().broken
    assert off[0] > 1e-2  # of the smallest entries, which the norm does not see


def nothing(*_, **__):
    """Accumulate nothing."""


def scaled(wrong):
    """Return the op with one of its sums slightly off."""

    def op(input, grad, *sums, **options):
        reference.grad_moments(input, grad, *sums, **options)
        sums[wrong].mul_(1.01)

    return op


def smallest(scores, keep):
    """Keep as many scores, but the smallest."""
    return reference.global_topk([-s for s in scores], keep)


@pytest.mark.parametrize(
    "op, wrong",
    [
        ("grad_moments", nothing),
        ("grad_moments", scaled(0)),
        ("grad_moments", scaled(1)),
        ("global_topk", smallest),
    ],
)
def test_kernels_that_compute_wrongly_are_reported(op, wrong, monkeypatch, capsys):
    monkeypatch.setattr(f"fisherprune.ops.{op}", wrong)
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"cpu +broken", shown)
    assert "! the kernels compute wrongly on cpu\n    -> run `pip install" in shown


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
