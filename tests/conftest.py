"""What all tests share."""

import os
from collections import Counter
from fnmatch import fnmatch

import pytest
import result_trees as trees
import torch
from cpu_graph import CpuGraphs
from hypothesis import settings
from trainings import small_run

from fisherprune.statistics.recording import RECORDERS

settings.register_profile("no clock", deadline=None)  # no test depends on time
settings.load_profile("no clock")

# Else MKL's products depend on where their operands lie in memory. It reads this when
# it is first used.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


FIRST = (
    "*/csrc/test_cuda_emulated.py",  # compiles what the other emulated ones run
    "*/train/test_kill.py",
    "*/examples/test_examples.py",
    "*/docs/test_code_blocks.py",
    "*/docs/test_build.py",
    "*/test_setup.py",
    "*/train/test_train_ranks.py",
    "*/csrc/test_cuda_emulated_*.py",
)
"""Files that take long: last, one process would run them while the others wait."""


def pytest_collection_modifyitems(items):
    """Put these files first, then those of many tests."""
    sizes = Counter(item.path for item in items)
    ranks = {
        path: next(
            (i for i, each in enumerate(FIRST) if fnmatch(path, each)), len(FIRST)
        )
        for path in sizes
    }
    items.sort(key=lambda item: (ranks[item.path], -sizes[item.path]))


@pytest.fixture(autouse=True)
def _fresh_random_numbers():
    """Draw other numbers in every run; the seed is shown where a test fails."""
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")


@pytest.fixture
def one_thread():
    """Run on one thread: in tiny layers threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpu_graphs(monkeypatch):
    """Let the CPU have graphs; return those that will be made."""
    made = CpuGraphs()
    monkeypatch.setitem(RECORDERS, "cpu", made)
    return made


@pytest.fixture
def tf32():
    """Set TF32 for the test, put back what was there."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [b.fp32_precision for b in backends]

    def set_to(precision):
        for b in backends:
            b.fp32_precision = precision

    yield set_to
    for b, precision in zip(backends, before, strict=True):
        b.fp32_precision = precision


@pytest.fixture
def mistake(capsys):
    """Return what gives the line that a command ends in: all that it prints."""

    def line(main, *arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    return line


@pytest.fixture
def small(tmp_path):
    """Return a run of one short epoch."""
    return small_run(output_dir=str(tmp_path / "runs"))


@pytest.fixture
def study(tmp_path):
    """Two methods, two sparsities; (snip, 0.98) has one seed; dense has two."""
    accuracies = {}
    numbers = torch.rand(100).tolist()
    for method, sparsity, seeds in (
        ("snip", 0.9, (0, 1, 2)),
        ("fts", 0.9, (0, 1, 2)),
        ("snip", 0.98, (1,)),
        ("none", 0.0, (0, 1)),
    ):
        for seed in seeds:
            best, last = numbers.pop(), numbers.pop()
            fields = {"method": method, "sparsity": sparsity, "seed": seed}
            trees.add_run(tmp_path, best, last, **fields)
            accuracies[method, sparsity, seed] = best, last
    return tmp_path, accuracies
