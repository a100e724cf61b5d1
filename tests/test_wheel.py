"""The compiled files as a wheel holds them, repaired as every wheel of ours is."""

import io
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fisherprune.ops import kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LIBRARY, MODULE = Path(kernels.PATH), Path(sys.modules["fisherprune._C"].__file__)
OURS = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0"}
OURS |= {"ld-linux-x86-64.so.2"}
TORCH = {"libc10.so", "libtorch.so", "libtorch_cpu.so"}
CUDA = {"libc10_cuda.so", "libtorch_cuda.so"}


def tool(name):
    found = shutil.which(name, path=f"{BIN}:/usr/local/bin:/usr/bin:/bin")
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def repair_command():
    """Return the words of the command in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    return shlex.split(settings["cibuildwheel"]["repair-wheel-command"])


def bare_wheel(folder):
    """Return a wheel of the compiled files alone."""
    path = folder / "fisherprune-0-cp311-cp311-linux_x86_64.whl"
    info = "fisherprune-0.dist-info"
    head = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: false\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in (LIBRARY, MODULE):
            wheel.write(file, f"fisherprune/{file.name}")
        wheel.writestr(f"{info}/METADATA", "Name: fisherprune\nVersion: 0\n")
        wheel.writestr(f"{info}/WHEEL", f"{head}Tag: cp311-cp311-linux_x86_64\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{n},,\n" for n in wheel.namelist()))
    return path


def test_a_wheel_is_manylinux_without_a_library_of_others(tmp_path):
    tool("patchelf")
    wheel, out = bare_wheel(tmp_path), tmp_path / "out"
    places = {"{dest_dir}": str(out), "{wheel}": str(wheel)}
    words = [places.get(word, word) for word in repair_command()]
    path = f"{BIN}:/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run(
        [tool(words[0]), *words[1:]], env={"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (repaired,) = out.iterdir()
    assert re.search(r"-manylinux_2_\d+_x86_64", repaired.name), repaired.name
    with zipfile.ZipFile(repaired) as found:
        held = {n for n in found.namelist() if ".so" in n}
        assert held == {f"fisherprune/{file.name}" for file in (LIBRARY, MODULE)}
        for file in (LIBRARY, MODULE):
            assert found.read(f"fisherprune/{file.name}") == file.read_bytes()


def needed(path):
    """Return the libraries that a file asks the loader for."""
    elffile = pytest.importorskip("elftools.elf.elffile")
    file = elffile.ELFFile(io.BytesIO(path.read_bytes()))
    tags = file.get_section_by_name(".dynamic").iter_tags()
    return {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}


def test_the_library_knows_no_python_and_the_module_no_torch():
    asked = needed(LIBRARY)
    assert {name for name in asked if "python" in name} == set()
    cuda = {name for name in asked if name.startswith("libcudart.so.")} | CUDA
    assert asked - OURS - TORCH <= (cuda if kernels.CUDA_VERSION else set())
    assert needed(MODULE) - OURS == {LIBRARY.name}


def test_the_library_exports_its_facts_and_no_code_of_others():
    """Other libraries of the process may have functions of the same names."""
    elffile = pytest.importorskip("elftools.elf.elffile")
    file = elffile.ELFFile(io.BytesIO(LIBRARY.read_bytes()))
    symbols = file.get_section_by_name(".dynsym").iter_symbols()
    own = [s.name for s in symbols if s.entry.st_shndx != "SHN_UNDEF"]
    assert {n for n in own if "fisherprune" in n and not n.startswith("_Z")} == {
        "fisherprune_facts",
        "fisherprune_cpu_capability",
        "fisherprune_mkl_is_narrow",
    }


@pytest.mark.skipif(not shutil.which("make"), reason="make is not on the PATH")
def test_make_repairs_as_other_builders_do():
    command = ["make", "-n", "wheel"]
    shown = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = shown.stdout.replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if "auditwheel repair" in line)
    words, theirs = shlex.split(line), repair_command()
    assert (
        words[words.index("repair") : words.index("-w")]
        == (theirs[theirs.index("repair") : theirs.index("-w")])
    )


def test_other_builders_know_what_to_build():
    command = [tool("cibuildwheel"), "--platform", "linux", "--print-build-identifiers"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == ["cp310-manylinux_x86_64"]
