"""What must hold before a GPU is measured: build, tests, sanitizer; needs none."""

import os
import sys

import pytest

from benchmarks.gpu import checks, profiles, programs
from benchmarks.gpu.measure import NotHere
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
    assert checks.covers(archs, capability) is covered


def test_faults_of_the_build_are_named(monkeypatch):
    monkeypatch.setattr(checks, "source_hash", lambda path: "now")
    monkeypatch.setattr(kernels, "SOURCE_HASH", "then")
    monkeypatch.setattr(kernels, "CUDA_VERSION", "")
    without, stale = checks.build_faults((9, 0))
    assert "built without CUDA" in without
    assert "must be built from csrc/ as it is (now), they are from then" in stale
    monkeypatch.setattr(kernels, "CUDA_VERSION", "13.0")
    monkeypatch.setattr(kernels, "CUDA_ARCHS", "8.0")
    uncovered, _ = checks.build_faults((9, 0))
    assert "must cover compute capability 9.0, they are built for 8.0" in uncovered
    monkeypatch.setattr(kernels, "SOURCE_HASH", "now")
    assert checks.build_faults((8, 6)) == []
    monkeypatch.setattr(kernels, "CUDA_ARCHS", "native")
    assert checks.build_faults((9, 0)) == []


def test_the_build_step_tells_the_facts_and_leaves_with_the_faults(monkeypatch):
    cuda = checks.torch.cuda
    monkeypatch.setattr(cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (0, 80 * 10**9))
    faults = ["stale", "other device"]
    monkeypatch.setattr(checks, "build_faults", lambda capability: faults)
    step = checks.build("cpu")
    found = next(step)
    place = found["environment"]
    assert (place["capability"], place["memory_gb"]) == ("9.0", 80)
    assert place["source_hash"] == kernels.SOURCE_HASH
    assert found["build"]["compiler"] == kernels.COMPILER
    with pytest.raises(SystemExit, match="^stale\nother device$"):
        next(step)
    faults.clear()
    assert len(list(checks.build("cpu"))) == 1


def found_by(step):
    """Return what a step yields, and the message that it leaves with."""
    found = []
    try:
        for part in step:
            found.append(part)
    except SystemExit as left:
        return found, left.code
    return found, None


def test_tests_are_counted_one_by_one(tmp_path):
    path = tmp_path / "test_a.py"
    path.write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "@pytest.mark.parametrize('x', ['PASSED b', 2])\n"
        "def test_b(x): assert x == 2\n"
        "@pytest.mark.skip\n"
        "def test_c(): pass\n"
    )
    found, message = found_by(checks.tests("cpu", [str(path)]))
    assert [sum(f["tests"]["counts"].values()) for f in found] == [1, 2, 3, 4]
    counts = {"passed": 2, "failed": 1, "skipped": 1}
    assert (found[-1]["tests"]["counts"], message) == (counts, "tests: exit 1")
    path.write_text("def test_a(): pass\n")
    assert found_by(checks.tests("cpu", [str(path)])) == (
        *([{"tests": {"counts": {"passed": 1}}}], None),
    )


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program on the PATH that prints its arguments, then a text."""

    def make(name, output, status=0):
        path = tmp_path / name
        path.write_text(
            f"#!{sys.executable}\nimport os, sys\nprint(sys.argv[1:])\n"
            f"print(os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING'))\n"
            f"print({output!r})\nraise SystemExit({status})\n"
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


@pytest.mark.parametrize("tool", checks.TOOLS)
def test_sanitizers_watch_the_small_cases(tool, program, capfd):
    program("compute-sanitizer", "========= ERROR SUMMARY: 0 errors")
    found, message = found_by(checks.sanitize(tool, "cuda:1"))
    assert (found, message) == ([{"sanitizer": {tool: {"found": 0}}}], None)
    arguments, uncached, _ = capfd.readouterr().out.splitlines()
    assert f"'--tool', '{tool}'" in arguments
    assert "'-m', 'benchmarks.gpu.cases', '--device', 'cuda:1'" in arguments
    assert ("kns=fisherprune" in arguments) == (tool != "initcheck")
    assert uncached == "1"


@pytest.mark.parametrize(
    ("status", "output", "found"),
    [
        (9, "========= ERROR SUMMARY: 1 error", 1),
        (0, "= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", 2),
        (1, "========= ERROR SUMMARY: 0 errors", 0),
        (0, "no summary", None),
    ],
)
def test_what_a_sanitizer_finds_is_a_failure(status, output, found, program):
    program("compute-sanitizer", output, status)
    results, message = found_by(checks.sanitize("racecheck", "cuda"))
    assert results == [{"sanitizer": {"racecheck": {"found": found}}}]
    assert message == f"racecheck: exit {status}, found {found}"


def test_racecheck_without_hazards_is_right(program):
    output = "= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    program("compute-sanitizer", output)
    _, message = found_by(checks.sanitize("racecheck", "cuda"))
    assert message is None


def test_a_sanitizer_for_other_devices_is_no_failure(program):
    output = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. See"
    program("compute-sanitizer", output, 1)
    with pytest.raises(NotHere, match="does not support this device"):
        list(checks.sanitize("memcheck", "cuda"))


def test_programs_are_found_or_missed_aloud(monkeypatch, tmp_path):
    monkeypatch.setattr(programs.shutil, "which", lambda name: None)
    monkeypatch.setattr(programs.glob, "glob", lambda pattern: [])
    for step in (checks.sanitize("memcheck", "cuda"), profiles.ncu("cuda")):
        with pytest.raises(NotHere, match="is not installed"):
            next(step)
    program = tmp_path / "ncu"
    program.touch(mode=0o755)
    monkeypatch.setattr(programs.glob, "glob", lambda pattern: [str(program)])
    assert programs.find_program("ncu") == str(program)


def test_counters_of_every_launch_are_kept(program, capfd):
    counters = ['"ID","Kernel Name"', '"0","window<1>(int)"', '"1","dense"']
    program("ncu", "\n".join(["==PROF== Connected", "right", *counters]))
    assert list(profiles.ncu("cuda")) == [{"ncu": counters}]
    arguments = capfd.readouterr().out.splitlines()[0]
    assert "'-m', 'benchmarks.gpu.cases', '--largest'" in arguments


def test_ncu_that_may_not_count_is_no_failure(program):
    program("ncu", "==ERROR== ERR_NVGPUCTRPERM - The user does not", 1)
    with pytest.raises(NotHere, match="may not read the counters"):
        list(profiles.ncu("cuda"))
    program("ncu", "==ERROR== Unknown metric", 1)
    assert found_by(profiles.ncu("cuda")) == ([], "ncu: exit 1")
