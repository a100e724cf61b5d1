"""``python -m fisherprune.doctor``: what is installed, what runs where, what is wrong.

Every trouble comes with the sentence that mends it. The exit code is 0 where
fisherprune works, with or without a GPU, and 1 where it does not.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fisherprune.commandline import Parser, prepare, run_command

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = """\
Versions, what was built, which kernels each device uses, how to mend what is wrong.

Exit code: 0 where fisherprune works, with or without a GPU, 1 where it does not, 2 for
a mistake in the command.
"""
# The dependencies, named here so that a source folder that is not installed has them.
PACKAGES = [
    *("torch", "torchvision", "numpy", "pillow", "safetensors", "scikit-learn"),
    *("tqdm", "jinja2", "filelock"),
    *(["tomli"] if sys.version_info < (3, 11) else []),
]
REINSTALL = "run `pip install --no-build-isolation .` in the source folder"


@dataclass
class Findings:
    """Lines of facts, and troubles with their remedies."""

    lines: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    broken: bool = False

    def fact(self, name: str, value: object) -> None:
        """Add one line of the table."""
        self.lines.append(f"  {name:<14} {value}")

    def trouble(self, text: str, remedy: str, broken: bool = False) -> None:
        """Add a trouble; ``broken`` where nothing works until it is mended."""
        self.troubles.append(f"{text}\n    -> {remedy}")
        self.broken |= broken

    def __str__(self) -> str:
        """Return the page to print."""
        verdict = "Troubles:" if self.troubles else "No trouble found."
        marks = [f"  ! {trouble}" for trouble in self.troubles]
        return "\n".join(["fisherprune doctor", "", *self.lines, "", verdict, *marks])


def examine() -> Findings:
    """Look at the installation and try the kernels."""
    findings = Findings()
    findings.fact("python", f"{platform.python_version()} ({sys.executable})")
    _packages(findings)
    try:
        from fisherprune.ops import kernels
    except ImportError as error:
        findings.trouble("the compiled kernels do not load", str(error), True)
        return findings
    _build(findings, kernels)
    _devices(findings, kernels)
    return findings


def _packages(findings: Findings) -> None:
    for name in ("fisherprune", *PACKAGES):
        try:
            findings.fact(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            findings.fact(name, "not installed")
            findings.trouble(f"{name} is not installed", _remedy(name))
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pass  # said above
    except Exception as error:
        findings.trouble(
            f"torchvision does not import beside this torch: {error}",
            "install a matching pair: `pip install --upgrade torch torchvision`",
        )


def _remedy(name: str) -> str:
    return "run `pip install .`" if name == "fisherprune" else f"`pip install {name}`"


def _build(findings: Findings, kernels: ModuleType) -> None:
    findings.fact("kernels", kernels.PATH)
    findings.fact("built with", f"torch {kernels.TORCH_VERSION}, {kernels.COMPILER}")
    if kernels.CUDA_VERSION:
        cuda = f"{kernels.CUDA_VERSION}, for {kernels.CUDA_ARCHS}"
    else:
        cuda = "not built: C++ kernels only"
    findings.fact("CUDA kernels", cuda)
    if kernels.CUDA_VERSION:
        findings.fact("wgmma kernel", _wgmma(kernels.CUDA_ARCHS))
    from fisherprune.ops.sources import source_hash

    csrc = Path(__file__).resolve().parent.parent / "csrc"
    if csrc.is_dir() and source_hash(csrc) != kernels.SOURCE_HASH:
        findings.trouble(f"the kernels were not built from {csrc} as it is", REINSTALL)


def _wgmma(archs: str) -> str:
    if "9.0a" not in archs:
        return "not built: TORCH_CUDA_ARCH_LIST had no 9.0a"
    wish = os.environ.get("FISHERPRUNE_CUDA_WGMMA", "")
    return "built, on" if wish == "1" else "built, off: FISHERPRUNE_CUDA_WGMMA is not 1"


def _devices(findings: Findings, kernels: ModuleType) -> None:
    import torch

    threads = torch.get_num_threads()
    how = f"{kernels.cpu_capability()} kernels, {threads} threads"
    findings.fact("cpu", f"{_try_kernels(findings, 'cpu')}, {how}")
    if not torch.cuda.is_available():
        findings.fact("cuda", _why_no_gpu())
        return
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        name = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
        if not kernels.CUDA_VERSION:
            findings.fact(f"cuda:{i}", f"{name}, no kernels")
            findings.trouble(
                f"cuda:{i} has no kernels: fisherprune was built without CUDA",
                f"with nvcc on the PATH, {REINSTALL}",
            )
        else:
            findings.fact(f"cuda:{i}", f"{_try_kernels(findings, f'cuda:{i}')}, {name}")


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    return "none found: the C++ kernels run on the CPU"


def _try_kernels(findings: Findings, device: str) -> str:
    """Run both ops on a few numbers and compare with their PyTorch twins."""
    import torch

    from fisherprune import ops
    from fisherprune.ops import reference

    generator = torch.Generator().manual_seed(0)
    input, grad = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))
    found = [torch.zeros(2, 2, 3, 3, device=device) for _ in range(2)]
    truth = [torch.zeros(2, 2, 3, 3, dtype=torch.float64) for _ in range(2)]
    try:
        ops.grad_moments(input.to(device), grad.to(device), *found, padding=(1, 1))
        masks, _ = ops.global_topk(found, [7])
    except Exception as error:
        findings.trouble(
            f"the kernels fail on {device}: {error}", REINSTALL, broken=True
        )
        return "broken"
    reference.grad_moments(input, grad, *truth, padding=(1, 1))
    twins, _ = reference.global_topk([f.cpu() for f in found], [7])
    right = all(map(_close, found, truth)) and all(
        torch.equal(mask.cpu(), twin)
        for mask, twin in zip(masks[0], twins[0], strict=True)
    )
    if not right:
        findings.trouble(f"the kernels compute wrongly on {device}", REINSTALL, True)
        return "broken"
    return "works"


def _close(found: Tensor, truth: Tensor) -> bool:
    """Compare norms: in TF32, a GPU's default, a single small entry may be far off."""
    return bool((found.cpu().double() - truth).norm() <= 5e-3 * truth.norm())


def main(argv: list[str] | None = None) -> int:
    """Print the report; return the exit code."""
    prepare()
    return run_command("fisherprune.doctor", lambda: _command(argv))


def _command(argv: list[str] | None) -> int:
    Parser("python -m fisherprune.doctor", description=DESCRIPTION).parse_args(argv)
    findings = examine()
    print(findings)
    return int(findings.broken)


if __name__ == "__main__":
    sys.exit(main())
