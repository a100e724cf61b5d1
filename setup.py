"""Builds the kernels, C++ and where a toolkit is found CUDA, and their Python module.

``fisherprune/_kernels.so`` has the kernels. It knows no Python: one file serves every
Python, and by torch's stable ABI every torch from 2.11. ``fisherprune/_C.*.so``, a
pybind11 module, tells Python what that file says of itself; it is a second's work and
made for each Python that is named.

Environment:
  FISHERPRUNE_CUDA=auto|0|1  auto (default): CUDA kernels where both a CUDA toolkit and
                             a CUDA build of torch are present, GPU or not; 0: without
                             CUDA; 1: fail where CUDA kernels can't be built
  FISHERPRUNE_PYTHONS        interpreters, separated by spaces, that the module is made
                             for, and the wheel with it; default: the running one
  FISHERPRUNE_VARIANT        ends the version, as in 0.1.0+cu130, to tell wheels apart
  TORCH_CUDA_ARCH_LIST       architectures, default "8.0;9.0+PTX"; 9.0a besides builds
                             the kernel that FISHERPRUNE_CUDA_WGMMA=1 turns on
  MAX_JOBS                   parallel compiler processes
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

CSRC = Path("csrc")
MODULE = CSRC / "module.cpp"
FACTS = Path("build", "facts", "build_facts.h")
ARCHS = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
# The oldest torch whose stable ABI has all that the kernels use.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Python's own flags ask for debug symbols: ten times the size.
CXX_FLAGS = ["-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]


def find_cuda_home():
    """Return the toolkit's folder, or None, and the environment variable it is from.

    Without a variable nvcc itself is asked: it may be a wrapper script far from its
    toolkit.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            return (home if has_nvcc(home) else None), name
    return ask_nvcc(), None


def has_nvcc(home):
    """Return whether a folder is that of a CUDA toolkit."""
    return Path(home, "bin", "nvcc").is_file()


def ask_nvcc():
    """Return the folder of the toolkit that nvcc on the PATH uses, or the usual one."""
    if nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "x.cu"]
        dryrun = subprocess.run(command, capture_output=True, text=True, check=False)
        if top := re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE):
            return str(Path(top[1]).resolve())
    return "/usr/local/cuda" if has_nvcc("/usr/local/cuda") else None


def nvcc_version(cuda_home):
    """Return the toolkit's version, such as "13.0"."""
    nvcc = Path(cuda_home, "bin", "nvcc")
    text = subprocess.run(
        [nvcc, "--version"], capture_output=True, text=True, check=True
    )
    return re.search(r"release (\d+\.\d+)", text.stdout)[1]


def why_no_cuda(wish, cuda_home, variable, torch_cuda):
    """Return why the CUDA kernels can't be built, or None if they can."""
    if wish == "0":
        return "FISHERPRUNE_CUDA=0"
    if cuda_home is None and variable:
        return f"{variable} is {os.environ[variable]}, which has no bin/nvcc"
    if cuda_home is None:
        return "no CUDA toolkit found (nvcc is not on the PATH, CUDA_HOME is not set)"
    if torch_cuda is None:
        return "this torch is built without CUDA"
    toolkit = nvcc_version(cuda_home)
    if toolkit.split(".")[0] != torch_cuda.split(".")[0]:
        return f"the CUDA toolkit is {toolkit} but torch is built for CUDA {torch_cuda}"
    return None


def choose_cuda():
    """Return the toolkit's version where CUDA kernels are to be built, else None."""
    wish = os.environ.get("FISHERPRUNE_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"FISHERPRUNE_CUDA must be auto, 0 or 1, got {wish!r}")
    cuda_home, variable = (None, None) if wish == "0" else find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home
    import torch  # after CUDA_HOME is set: torch reads it at import

    reason = why_no_cuda(wish, cuda_home, variable, torch.version.cuda)
    if reason is None:
        return nvcc_version(cuda_home)
    if wish == "1":
        raise SystemExit(f"FISHERPRUNE_CUDA=1, but {reason}")
    print(f"fisherprune: building the C++ kernels only: {reason}")
    return None


def parallel_flags():
    """Return what makes nvcc use several cores for a file, as far as it can."""
    nvcc = Path(os.environ["CUDA_HOME"], "bin", "nvcc")
    known = subprocess.run(
        [nvcc, "--help"], capture_output=True, text=True, check=True
    ).stdout
    jobs = os.environ.get("MAX_JOBS", "0")  # 0: as many as there are cores
    return ["--threads=2"] + [f"--split-compile={jobs}"] * ("--split-compile" in known)


def write_facts(torch_version, cuda_version):
    """Write what facts.cpp tells about this build, only where it changed."""
    source_hash = runpy.run_path("fisherprune/ops/sources.py")["source_hash"]
    facts = {
        "TORCH_VERSION": torch_version,
        "CUDA_VERSION": cuda_version or "",
        "CUDA_ARCHS": ARCHS if cuda_version else "",
        "SOURCE_HASH": source_hash(CSRC),
    }
    lines = [f'#define FISHERPRUNE_{name} "{fact}"\n' for name, fact in facts.items()]
    if not FACTS.exists() or FACTS.read_text() != "".join(lines):
        FACTS.parent.mkdir(parents=True, exist_ok=True)
        FACTS.write_text("".join(lines))


def check_tools():
    """End in one sentence where nothing can be built."""
    if int(setuptools.__version__.partition(".")[0]) < 77:
        raise SystemExit(
            f"fisherprune: building needs setuptools 77 or newer, but this is "
            f"{setuptools.__version__}: run `pip install --upgrade setuptools`"
        )
    compiler = os.environ.get("CXX") or "c++"
    if not shutil.which(shlex.split(compiler)[0]):
        raise SystemExit(
            f"fisherprune: building needs a C++17 compiler, but {compiler} is not on "
            "the PATH: install one (on Debian and Ubuntu: apt install g++) or let CXX "
            "name it"
        )


def kernels():
    """Describe the library with every source below csrc/ that applies."""
    check_tools()
    cuda_version = choose_cuda()
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    write_facts(torch.__version__, cuda_version)
    defines, parallel = [STABLE_ABI], []
    sources = {*CSRC.rglob("*.cpp")} - {MODULE}
    if cuda_version:
        sources |= {*CSRC.rglob("*.cu")}
        defines += ["-DUSE_CUDA"]
        parallel = parallel_flags()
    kind = CUDAExtension if cuda_version else CppExtension
    library = kind(
        name="fisherprune._kernels",
        sources=sorted(map(str, sources)),
        include_dirs=[str(path.resolve()) for path in (CSRC, FACTS.parent)],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *defines],
            "nvcc": ["-O3", *parallel, "-lineinfo", *defines],
        },
        extra_link_args=["-Wl,-soname,_kernels.so"],
        depends=sorted(map(str, CSRC.rglob("*.*h"))),
    )
    library.libraries.remove("torch_python")
    return library


def pythons():
    """Return the folder of headers of each Python to build for, by its ABI."""
    script = (
        "from sysconfig import get_config_var, get_path;"
        "print(get_config_var('SOABI'), get_path('include'))"
    )
    found = {}
    for python in os.environ.get("FISHERPRUNE_PYTHONS", "").split() or [sys.executable]:
        command = [python, "-c", script]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"FISHERPRUNE_PYTHONS: {python} does not run: {error}"
            ) from None
        abi, found[abi] = answer.stdout.rstrip("\n").split(" ", 1)
    return found


def module(abi, headers):
    """Describe fisherprune._C for one Python; pybind11's headers are among torch's."""
    from torch.utils.cpp_extension import include_paths

    return setuptools.Extension(
        name=f"fisherprune._C_{abi}",
        sources=[str(MODULE)],
        # Those of the Python that builds come last.
        include_dirs=[headers, str(CSRC.resolve()), *include_paths()],
        extra_compile_args=CXX_FLAGS,
        runtime_library_dirs=["$ORIGIN"],
        language="c++",
    )


def commands(abis):
    """Return torch's build_ext, and bdist_wheel, with our files' names and tags."""
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import BuildExtension

    class BuildBoth(BuildExtension):
        def get_ext_filename(self, name):
            *package, file = name.split(".")
            return os.path.join(*package, f"{file.replace('_C_', '_C.')}.so")

        def build_extension(self, each):
            library = self.get_ext_fullpath("fisherprune._kernels")
            objects = self.build_temp
            if each.name != "fisherprune._kernels":
                each.extra_objects = [library]
                self.build_temp = os.path.join(objects, each.name)
            super().build_extension(each)
            self.build_temp = objects

    class TaggedWheel(bdist_wheel):
        def get_tag(self):
            names = [re.sub(r"cpython-(\d+t?).*", r"cp\1", abi) for abi in abis]
            tags = ".".join(dict.fromkeys(name.rstrip("t") for name in names))
            return tags, ".".join(names), super().get_tag()[2]

    return {"build_ext": BuildBoth, "bdist_wheel": TaggedWheel}


ABIS = pythons()
VARIANT = os.environ.get("FISHERPRUNE_VARIANT")
setuptools.setup(
    ext_modules=[kernels(), *(module(abi, ABIS[abi]) for abi in ABIS)],
    cmdclass=commands(ABIS),
    options={"egg_info": {"tag_build": f"+{VARIANT}"}} if VARIANT else {},
)
