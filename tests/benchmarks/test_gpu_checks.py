"""What must hold before a GPU is measured: build, tests, sanitizer; needs none."""

import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.measure import NotHere
from benchmarks.gpu.steps import Unusable
from fisherprune.ops import kernels


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        ("8.0;9.0+PTX", (9, 0), True),
        ("8.0;9.0+PTX", (8, 6), True),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0;9.0", (12, 0), False),
        ("8.0;9.0+PTX", (7, 5), False),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("7.5 10.0", (10, 3), True),
        ("", (9, 0), None),
        ("native", (9, 0), None),
        ("Ampere;9.0", (9, 0), True),
        ("Hopper 8.0", (9, 0), None),
    ],
)
def test_architectures(archs, capability, covered):
    assert gpu_checks.covers(archs, capability) is covered


def test_faults_of_the_build_are_named(monkeypatch):
    monkeypatch.setattr(gpu_checks, "source_hash", lambda path: "now")
    monkeypatch.setattr(kernels, "SOURCE_HASH", "then")
    monkeypatch.setattr(kernels, "CUDA_VERSION", "")
    without, stale = gpu_checks.build_facts((9, 0))["faults"]
    assert "built without CUDA" in without
    assert "must be built from csrc/ as it is (now), they are from then" in stale
    monkeypatch.setattr(kernels, "CUDA_VERSION", "13.0")
    monkeypatch.setattr(kernels, "CUDA_ARCHS", "8.0")
    assert (
        "must cover compute capability 9.0, they are built for 8.0"
        in (gpu_checks.build_facts((9, 0))["faults"][0])
    )
    monkeypatch.setattr(kernels, "SOURCE_HASH", "now")
    assert gpu_checks.build_facts((8, 6))["faults"] == []
    monkeypatch.setattr(kernels, "CUDA_ARCHS", "native")
    assert gpu_checks.build_facts((9, 0))["faults"] == []


def test_what_the_steps_can_not_import_is_named(monkeypatch):
    assert gpu_checks.import_faults() == []
    monkeypatch.setitem(sys.modules, "tqdm", None)
    (fault,) = gpu_checks.import_faults()
    assert "must be able to import tqdm: " in fault
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_checks, "build_facts", lambda _: {"faults": []})
    with pytest.raises(Unusable, match="import tqdm"):
        gpu.check_build(10)


def test_a_command_is_ended_with_its_children():
    child = "import time; print('begun', flush=True); time.sleep(60)"
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    )
    outcome = gpu_checks.run_limited([sys.executable, "-c", parent], 2)
    assert (outcome.status, outcome.output) == (None, "begun\n")
    script = "import os; print(os.environ['HERE']); raise SystemExit(3)"
    outcome = gpu_checks.run_limited([sys.executable, "-c", script], 60, {"HERE": "x"})
    assert (outcome.ending, outcome.tail) == ("exit 3", ["x"])


def test_results_of_pytest_are_counted(tmp_path):
    path = tmp_path / "test_a.py"
    path.write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "@pytest.mark.parametrize('x', ['PASSED b', 2])\n"
        "def test_b(x): assert x == 2\n"
        "@pytest.mark.skip\n"
        "def test_c(): pass\n"
    )
    command = gpu_checks.pytest_command()
    command = command[: -len(gpu_checks.TESTS)] + [str(path)]
    outcome = gpu_checks.run_limited(command, 100)
    found = gpu_checks.pytest_result(outcome)
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert (found["ok"], found["ended"]) == (False, "exit 1")
    assert found["tail"]


def test_sanitizer_commands():
    for tool in gpu_checks.TOOLS:
        command = gpu_checks.sanitizer_command("/bin/cs", tool)
        assert command[:3] == ["/bin/cs", "--tool", tool]
        assert command[-2:] == ["-m", "benchmarks.gpu.cases"]
        filtered = "kns=fisherprune" in command
        assert filtered == (tool != "initcheck")
    assert (gpu_checks.ROOT / "benchmarks" / "gpu_cases.py").exists()


@pytest.mark.parametrize(
    ("status", "output", "found", "ok"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", 0, True),
        (9, "========= ERROR SUMMARY: 1 error", 1, False),
        (0, "= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        (
            0,
            "= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)",
            2,
            False,
        ),
        (1, "========= ERROR SUMMARY: 0 errors", 0, False),
        (0, "no summary", None, False),
        (None, "", None, False),
    ],
)
def test_sanitizer_results(status, output, found, ok):
    result = gpu_checks.sanitizer_result(Outcome(status, output))
    assert (result["found"], result["ok"]) == (found, ok)


@pytest.mark.parametrize(
    ("status", "output", "reason"),
    [
        (
            1,
            "========= COMPUTE-SANITIZER\n========= Error: Device not supported. See",
            "compute-sanitizer does not support this device",
        ),
        (None, "========= COMPUTE-SANITIZER\n", "ran out of time"),
        (None, "========= COMPUTE-SANITIZER\n========= Invalid __global__ read", None),
        (0, "========= ERROR SUMMARY: 0 errors", None),
        (9, "========= ERROR SUMMARY: 1 error", None),
        (1, "Traceback", None),
    ],
)
def test_a_sanitizer_that_can_not_run_tells_nothing(
    status, output, reason, monkeypatch
):
    assert gpu_checks.why_not_sanitized(Outcome(status, output)) == reason
    monkeypatch.setattr(gpu_checks, "find_sanitizer", lambda: "cs")
    monkeypatch.setattr(gpu_checks, "run_limited", lambda *_: Outcome(status, output))
    if reason is None:
        assert "memcheck" in gpu.run_sanitizer("memcheck", 1.0)["sanitizer"]
    else:
        with pytest.raises(NotHere, match=reason):
            gpu.run_sanitizer("memcheck", 1.0)


def test_a_sanitizer_is_found_or_missed_aloud(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_checks.glob, "glob", lambda pattern: [])
    with pytest.raises(NotHere, match="compute-sanitizer is not installed"):
        gpu_checks.find_sanitizer()
    program = tmp_path / "compute-sanitizer"
    program.touch(mode=0o755)
    monkeypatch.setattr(gpu_checks.glob, "glob", lambda pattern: [str(program)])
    assert gpu_checks.find_sanitizer() == str(program)
