"""Builds fisherprune._C: the C++ kernels, and the CUDA ones where a toolkit is found.

Environment:
  FISHERPRUNE_CUDA=auto|0|1  auto (default): CUDA kernels where both a CUDA toolkit and
                             a CUDA build of torch are present, GPU or not; 0: without
                             CUDA; 1: fail where CUDA kernels can't be built
  TORCH_CUDA_ARCH_LIST       architectures, default "8.0;9.0+PTX"
  MAX_JOBS                   parallel compiler processes
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import setuptools

CSRC = Path("csrc")
FACTS = Path("build", "facts", "build_facts.h")
ARCHS = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
# The oldest torch whose stable ABI has all that the kernels use.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


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
    """Write what module.cpp tells about this build, only where it changed."""
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


def extension():
    """Describe fisherprune._C with every source below csrc/ that applies."""
    check_tools()
    cuda_version = choose_cuda()
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    write_facts(torch.__version__, cuda_version)
    defines, parallel = [STABLE_ABI], []
    sources = [*CSRC.rglob("*.cpp")]
    if cuda_version:
        sources += CSRC.rglob("*.cu")
        defines += ["-DUSE_CUDA"]
        parallel = parallel_flags()
    kind = CUDAExtension if cuda_version else CppExtension
    return kind(
        name="fisherprune._C",
        sources=sorted(map(str, sources)),
        # pybind11's headers are among torch's.
        include_dirs=[str(path.resolve()) for path in (CSRC, FACTS.parent)],
        extra_compile_args={
            "cxx": ["-O3", "-Wall", "-Wextra", "-fvisibility=hidden", *defines],
            "nvcc": ["-O3", *parallel, "-lineinfo", *defines],
        },
        depends=sorted(map(str, CSRC.rglob("*.*h"))),
    )


def build_command():
    """Return torch's build_ext, which compiles with ninja and nvcc."""
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension.with_options(no_python_abi_suffix=False)


setuptools.setup(ext_modules=[extension()], cmdclass={"build_ext": build_command()})
