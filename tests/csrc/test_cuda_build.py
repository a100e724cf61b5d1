"""What nvcc and ptxas make of the CUDA kernels; needs the toolkit, but no GPU."""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fisherprune.ops import kernels

ROOT = Path(__file__).parents[2]
ARCHS = ("80", "90")
SOURCES = ROOT / "tests" / "support" / "emulator"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")


def find_cuobjdump() -> str | None:
    """Look on the PATH, in the toolkit, and in the copy that Triton brings along."""
    places = [Path(NVCC).resolve().parent if NVCC else None]
    try:
        import triton
    except ImportError:
        pass
    else:
        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    found = [shutil.which("cuobjdump")]
    found += [shutil.which("cuobjdump", path=str(p)) for p in places if p]
    return next(filter(None, found), None)


CUOBJDUMP = find_cuobjdump()


@dataclass
class Built:
    local: dict[str, int]  # bytes of local memory of each kernel, by mangled name
    sass: dict[str, list[str]]  # its instructions


def start_nvcc(arch: str, cubin: Path, source: str) -> subprocess.Popen:
    command = [NVCC, "-O3", "-cubin", f"-arch=sm_{arch}", "-Werror", "all-warnings"]
    command += ["-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-o", cubin, SOURCES / source]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def dumped(option: str, arch: str, path: Path) -> str:
    """Return what cuobjdump says of a cubin, or of a library's kernels."""
    command = [CUOBJDUMP, option, "-arch", f"sm_{arch}", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(arch: str, path: Path) -> dict[str, list[str]]:
    if CUOBJDUMP is None:
        return {}
    dump = dumped("-sass", arch, path)
    return {
        part.split()[0]: re.findall(
            r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", part
        )
        for part in dump.split("Function : ")[1:]
    }


def local_memory(report: str) -> dict[str, int]:
    """Return what ptxas reports: the frames of stacks, and what is spilled."""
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
    )
    return {k: sum(map(int, frame)) for k, frame in zip(kernels, frames, strict=True)}


def installed(arch: str) -> Built:
    """Return what is in the library that runs."""
    usage = dumped("-res-usage", arch, kernels.PATH)
    found = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+).* LOCAL:(\d+)", usage)
    local = {kernel: int(stack) + int(rest) for kernel, stack, rest in found}
    return Built(local, instructions(arch, kernels.PATH))


def build(archs: Sequence[str], source: str) -> dict[str, Built]:
    """Return what is made of the sources, in the library that runs or by nvcc."""
    there = re.findall(r"\d+[af]?", kernels.CUDA_ARCHS.replace(".", ""))
    if CUOBJDUMP is not None and all(arch in there for arch in archs):
        return {arch: installed(arch) for arch in archs}  # compiling takes minutes
    with tempfile.TemporaryDirectory() as folder:
        cubins = {arch: Path(folder, f"{arch}.cubin") for arch in archs}
        compilers = {a: start_nvcc(a, cubin, source) for a, cubin in cubins.items()}
        result = {}
        for arch, compiler in compilers.items():
            _, report = compiler.communicate()
            assert compiler.returncode == 0, report
            result[arch] = Built(local_memory(report), instructions(arch, cubins[arch]))
        return result


@pytest.fixture(scope="module")
def built() -> dict[str, Built]:
    return build(ARCHS, "kernels.cu")


@pytest.fixture(scope="module")
def built_for_hopper() -> Built:
    return build(["90a"], "wgmma.cu")["90a"]


FLOAT32 = 0  # of the enumeration Dtype
PRODUCT, SMALL_PRODUCT = "HMMA.1688.F32.TF32", "HMMA.1684.F32.TF32"


def is_of_small_images(kernel: str) -> bool:
    return "ELi1ELi1ELNS_5Dtype" in kernel


each_arch = pytest.mark.parametrize("arch", ARCHS)


def kernels_named(built: Built, name: str) -> dict[str, Counter]:
    if not built.sass:
        pytest.skip("no cuobjdump on this machine")
    found = {k: Counter(code) for k, code in built.sass.items() if name in k}
    assert found, name
    return found


def number_of(counts: Counter, pattern: str) -> int:
    return sum(n for code, n in counts.items() if re.fullmatch(pattern, code))


@each_arch
def test_no_kernel_uses_local_memory(arch, built):
    local = built[arch].local
    assert len(local) > 15 and not any(local.values()), local


@each_arch
def test_grad_moments_multiplies_on_tensor_cores(arch, built):
    for kernel, counts in kernels_named(built[arch], "grad_moments_kernel").items():
        assert number_of(counts, r"HMMA\.1688\.F32\.TF32") >= 4, kernel
        # Fragments come by 16-byte reads: two of grad and one of input at the least.
        assert number_of(counts, r"LDS\.128") >= 4, kernel


@each_arch
def test_whole_operands_take_a_third_of_the_products(arch, built):
    """Of 16 bits nothing is left out by TF32."""
    found = kernels_named(built[arch], "grad_moments_kernel")
    whole = [kernel for kernel in found if "ProductsE2E" in kernel]
    assert whole
    for kernel in whole:
        split = found[kernel.replace("ProductsE2E", "ProductsE1E")]
        products = [number_of(c, r"HMMA.*") for c in (found[kernel], split)]
        assert products[0] * 3 == products[1], kernel


@each_arch
def test_grad_moments_copies_past_the_registers(arch, built):
    """Kernels of float32 operands use asynchronous copies, of 16 bytes too."""
    for kernel, counts in kernels_named(built[arch], "grad_moments_kernel").items():
        copies = number_of(counts, r"LDGSTS.*"), number_of(counts, r"LDGSTS.*\.128.*")
        float32_only = re.search(r"ELb1EEEv", kernel)
        assert all(copies) if float32_only else not any(copies), kernel


@each_arch
def test_loads_of_halves_are_under_way_together(arch, built):
    """Between two stores of a kernel lie no loads, or those of all its rows."""
    for kernel in kernels_named(built[arch], "grad_moments_kernel"):
        if re.search(r"ELb1EEEv", kernel):
            continue  # of float32
        code = " ".join(built[arch].sass[kernel])
        runs = [part.count("LDG.E.U16") for part in re.split(r"\bSTS\b", code)]
        assert max(runs) <= 16 and min(filter(None, runs)) >= 4, kernel


@each_arch
def test_a_flush_waits_for_memory_once_a_column(arch, built):
    """Between two stores lie no loads, or those of all the column's rows."""
    for kernel in kernels_named(built[arch], "grad_moments_"):
        if re.search("grad_moments_(taps|lanes|wgmma)", kernel):
            continue  # theirs goes through shared memory
        products_m = re.search(r"TileShapeILi\d+ELi\d+ELi(\d+)E", kernel)
        code = " ".join(built[arch].sass[kernel])
        runs = [part.count("LDG.E") for part in re.split(r"\bSTG\.E\b", code)]
        assert min(filter(None, runs)) == 2 * int(products_m[1]), kernel


def words_of_products(counts: Counter) -> int:
    """Return how many a lane reads for its share of 4 x 4 products' operands."""
    return counts[PRODUCT] * 24 // 16 + counts[SMALL_PRODUCT] * 12 // 16


@each_arch
def test_images_in_shared_memory_are_read_in_few_instructions(arch, built):
    """Matrices of the gradient at once, copies of four values alone."""
    for kernel, counts in kernels_named(built[arch], "grad_moments_window").items():
        reads = number_of(counts, r"LDSM\.16\.M88\.4")
        if is_of_small_images(kernel):  # four positions of 32 rows at once
            assert counts[SMALL_PRODUCT] == reads * 8 >= 32, kernel
        else:  # eight of 16
            assert counts[PRODUCT] == reads * 4 >= 48, kernel
        wide = f"ELNS_5DtypeE{FLOAT32}E" in kernel
        copies = number_of(counts, rf"LDGSTS.*\.{128 if wide else 64}.*")
        assert number_of(counts, r"LDGSTS.*") == copies > 0, kernel
        # Each word that a product takes, in registers: nothing is written back.
        if wide:
            assert number_of(counts, r"STS\.128") == 0, kernel
        if wide and arch == "90":
            words = words_of_products(counts)
            assert number_of(counts, r"F2FP\.TF32.*") == words, kernel


@each_arch
def test_products_of_images_take_little_else(arch, built):
    """In windows of the usual pitch no address is computed for a read.

    A word is rounded in one instruction on sm_90, and in three on sm_80.
    """
    for kernel in kernels_named(built[arch], "grad_moments_window"):
        if "ELi0ELNS_5Dtype" in kernel:
            continue  # of any pitch
        small = is_of_small_images(kernel)
        product, least = (SMALL_PRODUCT, 16) if small else (PRODUCT, 32)
        runs = " ".join(built[arch].sass[kernel]).split("BRA")
        most = max((Counter(run.split()) for run in runs), key=lambda c: c[product])
        reads = number_of(most, r"LDS|LDSM.*")
        assert most[product] >= least, kernel
        assert reads * (8 if small else 4) == most[product] * 3, kernel
        rounding = words_of_products(most) * (1 if arch == "90" else 3)
        if f"ELNS_5DtypeE{FLOAT32}E" not in kernel:
            rounding = 0
        assert most.total() <= most[product] + reads + rounding + 20, kernel


def product_of(kernel: str) -> str:
    """Return the instruction for operands of the kernel's type."""
    halves = {"1": "HMMA.16816.F32", "2": "HMMA.16816.F32.BF16"}
    return halves.get(re.search(r"DtypeE(\d)E", kernel)[1], PRODUCT)


@each_arch
def test_products_of_taps_take_little_else(arch, built):
    """No address is computed for a tap, nothing is widened or written back."""
    for kernel, counts in kernels_named(built[arch], "grad_moments_taps").items():
        product, wide = product_of(kernel), f"ELNS_5DtypeE{FLOAT32}E" in kernel
        # Nine taps of two times 16 rows: in a group's first product, and in the others.
        assert counts[product] == number_of(counts, r"HMMA.*") == 36, kernel
        assert counts["LDSM.16.M88.4"] == 4, kernel
        runs = " ".join(built[arch].sass[kernel]).split("BRA")
        most = max((Counter(run.split()) for run in runs), key=lambda c: c[product])
        assert most[product] == 18 and most["LDS"] <= 18, kernel
        prepared = (26 if arch == "90" else 78) if wide else 12  # rounded, or shifted
        assert most.total() <= 18 + 2 + 18 + prepared + 24, kernel
        if wide and arch == "90":
            assert number_of(most, r"F2FP\.TF32.*") == 26, kernel


@each_arch
def test_a_flush_of_taps_waits_for_memory_once_in_four_rows(arch, built):
    """What eight rows have goes through shared memory, and is written in whole runs."""
    of_taps = kernels_named(built[arch], "grad_moments_taps")
    for kernel in (*of_taps, *kernels_named(built[arch], "grad_moments_lanes")):
        code = " ".join(built[arch].sass[kernel])
        runs = [part.count("LDG.E") for part in re.split(r"\bSTG\.E\b", code)]
        assert max(runs) == 9, kernel
        # Where a tile need not be full, the compiler splits some runs.
        if "grad_moments_taps" in kernel:
            assert min(filter(None, runs)) == 9, kernel


@each_arch
def test_products_of_lanes_take_little_else(arch, built):
    """Nothing is unfolded, and no place is computed for a tap."""
    for kernel, counts in kernels_named(built[arch], "grad_moments_lanes").items():
        product, wide = product_of(kernel), f"DtypeE{FLOAT32}E" in kernel
        planes = "LayoutE0E" in kernel
        assert counts[product] == number_of(counts, r"HMMA.*") == 36, kernel
        assert counts["LDSM.16.M88.4"] == (2 if planes else 0), kernel
        transposed = 0 if planes or wide else 2 + 2 * 5
        assert counts["LDSM.16.MT88.4"] == transposed, kernel
        copies = number_of(counts, r"LDGSTS.*"), number_of(counts, r"LDGSTS.*\.128.*")
        assert copies[0] > copies[1] > 0 if planes else copies[0] == copies[1], kernel
        runs = " ".join(built[arch].sass[kernel]).split("BRA")
        most = max((Counter(run.split()) for run in runs), key=lambda c: c[product])
        reads = number_of(most, r"LDS|LDSM.*")
        assert most[product] == 18 and reads == (5 if transposed else 18), kernel
        prepared = 12 if planes else 0  # shifted
        if wide:
            prepared = 18 if arch == "90" else 54  # rounded
        assert most.total() <= 18 + reads + prepared + 26, kernel  # with the places


@each_arch
def test_products_without_taps_take_little_else(arch, built):
    """In the loop over positions there is little but reads and products."""
    for kernel, counts in kernels_named(built[arch], "grad_moments_dense").items():
        product, wide = product_of(kernel), f"DtypeE{FLOAT32}E" in kernel
        planes = "LayoutE0E" in kernel
        assert counts[product] == number_of(counts, r"HMMA.*") == 32, kernel
        matrices = counts["LDSM.16.M88.4"], counts["LDSM.16.MT88.4"]
        words = wide and not planes
        assert matrices == (12 * planes, 12 * (not planes and not words)), kernel
        # Of both operands, 16 bytes at a time; or 4 of neighbouring positions.
        copies = number_of(counts, r"LDGSTS.*\.128.*"), number_of(counts, r"LDGSTS.*")
        assert copies == (8, 40 if planes else 8), kernel
        runs = " ".join(built[arch].sass[kernel]).split("BRA")
        most = max(runs, key=lambda run: (run.count(product), len(run)))
        sums = 64 if "ELb1EEEv" in kernel else 0  # outside of the tensor cores
        read = 24 if words else 6
        rounded = (24 if arch == "90" else 72) if wide else 0
        assert most.count(product) == 16, kernel
        assert len(most.split()) <= 34 + read + rounded + sums, kernel


@each_arch
def test_copies_to_pixels_are_under_way_together(arch, built):
    """All loads of a thread, before the first store; and these of 16 bytes."""
    for kernel in kernels_named(built[arch], "copy_to_pixels"):
        code = " ".join(built[arch].sass[kernel])
        loads = [part.count("LDG.E.U16") for part in re.split(r"\bSTS\.128\b", code)]
        assert loads[0] == sum(loads) == 16, kernel
        assert "STG.E.128" in code and "LDS.128" in code, kernel


@each_arch
@pytest.mark.parametrize("kernel", ["histogram", "count_ties", "mask"])
def test_topk_reads_four_scores_at_a_time(arch, kernel, built):
    for name, counts in kernels_named(built[arch], f"topk_{kernel}_kernel").items():
        assert number_of(counts, r"LDG\.E\.128.*") >= 1, name


@each_arch
def test_topk_adds_in_shared_memory(arch, built):
    for kernel, counts in kernels_named(built[arch], "topk_histogram_kernel").items():
        # The hardware's own count of lanes with equal bins.
        assert number_of(counts, r"ATOMS\.POPC\.INC.*") >= 1, kernel


@each_arch
def test_no_float_atomics(arch, built):
    for kernel, counts in kernels_named(built[arch], "").items():
        assert (
            number_of(counts, r"(ATOM|ATOMG|ATOMS|RED|REDG)\..*F(32|64|16).*") == 0
        ), kernel


@each_arch
def test_products_of_warpgroups_are_of_sm_90a_alone(arch, built):
    for kernel, code in built[arch].sass.items():
        if "grad_moments_wgmma" in kernel:
            assert "BPT.TRAP" in code and len(code) < 40, kernel


def test_products_of_warpgroups_take_little_else(built_for_hopper):
    """One after the other, on registers that stay, until one wait for up to eight."""
    assert not any(built_for_hopper.local.values()), built_for_hopper.local
    for kernel, counts in kernels_named(built_for_hopper, "grad_moments_wgmma").items():
        product = "HGMMA.64x144x8.F32.TF32"
        assert counts[product] == number_of(counts, "HGMMA.*"), kernel
        assert counts[product] == (2 if "ELi2EEEv" in kernel else 8), kernel
        code = " ".join(built_for_hopper.sass[kernel])
        (between,) = re.findall("WARPGROUP.ARRIVE (.*?) WARPGROUP.DEPBAR", code)
        assert len(between.split()) <= 12 * counts[product] + 40, kernel
        # Parts of the gradient, for one block or for all of a cluster; three shifts.
        assert counts["UTMALDG.4D"] == 4 and counts["UTMALDG.4D.MULTICAST"] == 1, kernel
        assert number_of(counts, "LDGSTS.*|LDSM.*|HMMA.*") == 0, kernel
