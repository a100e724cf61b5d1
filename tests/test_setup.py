"""What setup.py decides about CUDA, asked of setup.py itself."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def decide(folder, *command, **variables):
    """Run setup.py in a copy of the source folder, without compiling anything."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "fisherprune"):
        skip = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")}
    command = [sys.executable, *(command or ["setup.py", "--name"])]
    return subprocess.run(
        command, cwd=folder, env=kept | variables, capture_output=True, text=True
    )


def facts(folder):
    return (folder / "build" / "facts" / "build_facts.h").read_text()


def test_zero_builds_without_cuda_and_says_so(tmp_path):
    result = decide(tmp_path, FISHERPRUNE_CUDA="0")
    assert result.returncode == 0
    assert "building the C++ kernels only: FISHERPRUNE_CUDA=0" in result.stdout
    assert '#define FISHERPRUNE_CUDA_VERSION ""' in facts(tmp_path)


LOOK = """
from distutils.core import run_setup
found = run_setup("setup.py", ["bdist_wheel"], stop_after="commandline")
wheel, build = map(found.get_command_obj, ["bdist_wheel", "build_ext"])
wheel.ensure_finalized(), build.ensure_finalized()
print(found.get_version(), "-".join(wheel.get_tag()[:2]))
for each in build.extensions:
    print(build.get_ext_filename(each.name), each.include_dirs[0])
    assert "torch_python" not in each.libraries and each.language == "c++"
"""


def test_one_wheel_serves_several_pythons(tmp_path):
    """Those are asked for their names and headers, and need no torch."""
    names = {}
    for abi in ("cpython-310-x86_64-linux-gnu", "cpython-313t-x86_64-linux-gnu"):
        names[abi] = tmp_path / abi
        names[abi].write_text(f"#!/bin/sh\necho '{abi} /headers of/{abi}'\n")
        names[abi].chmod(0o755)
    source = tmp_path / "source"
    source.mkdir()
    given = {"FISHERPRUNE_CUDA": "0", "FISHERPRUNE_VARIANT": "cpu"}
    given["FISHERPRUNE_PYTHONS"] = " ".join(map(str, names.values()))
    result = decide(source, "-c", "import setuptools\n" + LOOK, **given)
    assert result.returncode == 0, result.stderr
    shown = result.stdout.splitlines()[-4:]
    version = re.search(
        r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert shown[0] == f"{version[1]}+cpu cp310.cp313-cp310.cp313t"
    assert shown[1].startswith("fisherprune/_kernels.so ")
    assert shown[2:] == [f"fisherprune/_C.{abi}.so /headers of/{abi}" for abi in names]


def test_a_python_that_does_not_run_is_named(tmp_path):
    result = decide(tmp_path, FISHERPRUNE_PYTHONS="/nonexistent/python")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "FISHERPRUNE_PYTHONS: /nonexistent/python does not run: " in result.stderr


def test_other_values_are_refused(tmp_path):
    result = decide(tmp_path, FISHERPRUNE_CUDA="yes")
    assert result.returncode != 0
    assert "FISHERPRUNE_CUDA must be auto, 0 or 1, got 'yes'" in result.stderr


def test_one_fails_where_the_toolkit_does_not_fit(tmp_path):
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.2, V1.2.3'\n")
    nvcc.chmod(0o755)
    source = tmp_path / "source"
    source.mkdir()
    result = decide(source, FISHERPRUNE_CUDA="1", CUDA_HOME=str(toolkit))
    assert result.returncode != 0
    reason = "the CUDA toolkit is 1.2" if torch.version.cuda else "built without CUDA"
    assert "FISHERPRUNE_CUDA=1, but" in result.stderr
    assert reason in result.stderr


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_home_without_a_compiler_is_named(tmp_path, variable):
    reason = f"{variable} is /nonexistent, which has no bin/nvcc"
    for wish, fails in (("auto", False), ("1", True)):
        source = tmp_path / wish
        source.mkdir()
        given = {"FISHERPRUNE_CUDA": wish, variable: "/nonexistent"}
        result = decide(source, **given)
        assert (result.returncode != 0) == fails
        assert reason in (result.stderr if fails else result.stdout)
        assert "Traceback" not in result.stderr


def tracked():
    """Return the files that git knows and are there."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [name for name in found.stdout.split("\0") if (ROOT / name).is_file()]


def test_a_source_archive_holds_all_that_is_needed(tmp_path):
    names = tracked()
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for junk in ("csrc/cpu/x.o", "tests/__pycache__/x.txt", "fisherprune/_C.x.so"):
        (tmp_path / junk).parent.mkdir(exist_ok=True)
        (tmp_path / junk).touch()
    command = [sys.executable, "setup.py", "-q", "egg_info"]
    command += ["build_py", "--build-lib", "built"]
    environment = os.environ | {"FISHERPRUNE_CUDA": "0"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    listed = (tmp_path / "fisherprune.egg-info" / "SOURCES.txt").read_text().split()
    assert set(names) - {".gitignore"} <= set(listed)
    assert not [name for name in listed if "/x." in name or name.endswith(".so")]
    assert (tmp_path / "built/fisherprune/py.typed").is_file()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not on the PATH")
def test_make_builds_with_the_torch_it_has_installed(tmp_path):
    command = ["make", "-n", "-B", f"VENV={tmp_path}", "demo", "bench"]
    shown = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    installs = [line for line in shown.splitlines() if "pip install" in line]
    torch_is_there = [" torch " in f"{line} " for line in installs].index(True)
    builds = [i for i, line in enumerate(installs) if '".[' in line]
    assert len(builds) == 2 and min(builds) > torch_is_there
    assert all("--no-build-isolation" in installs[i] for i in builds)


def test_a_build_without_a_compiler_ends_in_one_sentence(tmp_path):
    result = decide(tmp_path, FISHERPRUNE_CUDA="0", CXX="/nonexistent/c++ -O1")
    assert result.returncode != 0
    assert result.stderr == (
        "fisherprune: building needs a C++17 compiler, but /nonexistent/c++ -O1 is not "
        "on the PATH: install one (on Debian and Ubuntu: apt install g++) or let CXX "
        "name it\n"
    )


def test_an_old_setuptools_is_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import setuptools; setuptools.__version__ = '65.5.0'"
    )
    source = tmp_path / "source"
    source.mkdir()
    result = decide(source, FISHERPRUNE_CUDA="0", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    words = (
        "building needs setuptools 77 or newer, but this is 65.5.0: run `pip install"
    )
    assert words in result.stderr and "Traceback" not in result.stderr


def test_pybind11_itself_is_not_needed(tmp_path):
    """Its headers come with torch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules['pybind11'] = None"
    )
    source = tmp_path / "source"
    source.mkdir()
    result = decide(source, FISHERPRUNE_CUDA="0", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    from torch.utils.cpp_extension import include_paths

    assert any(Path(path, "pybind11/pybind11.h").is_file() for path in include_paths())


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on the PATH")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_auto_honours_the_architectures(tmp_path):
    result = decide(tmp_path, TORCH_CUDA_ARCH_LIST="9.0")
    assert result.returncode == 0
    if "C++ kernels only: the CUDA toolkit is" in result.stdout:
        pytest.skip(result.stdout)
    assert '#define FISHERPRUNE_CUDA_ARCHS "9.0"' in facts(tmp_path)
