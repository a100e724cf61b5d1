"""What statistics depend on changes their key, and nothing else does."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from nets import conv_net

import fisherprune as fp
from fisherprune.ops import kernels
from fisherprune.statistics import key
from fisherprune.statistics.key import hash_of, statistics_key


class Case:
    """A network, its images, and what is said about both."""

    def __init__(self):
        self.model = conv_net()
        self.x = torch.randint(256, (7, 3, 9, 9), dtype=torch.uint8)
        self.y = torch.randint(4, (7,))
        self.about = {"batch size": 3, "group size": 1, "mean": (0.5, 0.25, 0.125)}

    def key(self):
        state, device = self.model.state_dict(), torch.device("cpu")
        return statistics_key(self.about, state, (self.x, self.y), device)


def _flip_lowest_bit(tensor):
    tensor.detach().view(torch.int32).view(-1)[5:6].bitwise_xor_(1)


def _swap(tensor):
    tensor[[1, 2]] = tensor[[2, 1]].clone()


def _set(holder, **values):
    for name, value in values.items():
        setattr(holder, name, value)


CHANGES = {
    "a bit of a weight": lambda c: _flip_lowest_bit(c.model[3].weight),
    "a running mean": lambda c: _flip_lowest_bit(c.model[1].running_mean),
    "a bit of an image": lambda c: c.x[3, 1, 4].bitwise_xor_(1),
    "a label": lambda c: c.y[6:].add_(1),
    "the order of images": lambda c: (_swap(c.x), _swap(c.y)),
    "an image less": lambda c: _set(c, x=c.x[:-1], y=c.y[:-1]),
    "the shape of images": lambda c: _set(c, x=c.x.mT.reshape(7, 3, 3, 27)),
    "the labels' type": lambda c: _set(c, y=c.y.int()),
    "the layout of a weight": lambda c: c.model[3].to(
        memory_format=torch.channels_last
    ),
    "the name of a weight": lambda c: _set(c, model=torch.nn.Sequential(c.model)),
    "the batch size": lambda c: c.about.update({"batch size": 4}),
    "the group size": lambda c: c.about.update({"group size": 2}),
    "the normalization": lambda c: c.about.update(mean=(0.5, 0.25, 0.126)),
    "something more": lambda c: c.about.update(skip=["bias"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(change):
    case = Case()
    before = case.key()
    assert case.key() == before
    CHANGES[change](case)
    assert case.key() != before


def test_mode_gradients_and_a_pass_do_not_show():
    case = Case()
    before = case.key()
    case.model.eval()
    fp.score_all(case.model, [(case.x.float(), case.y)], ["fts", "grasp"])
    case.model(case.x.float()).sum().backward()
    assert case.key() == before


def test_other_code_shows(monkeypatch):
    case = Case()
    before = case.key()
    monkeypatch.setattr(key, "CODE", "of another version")
    assert case.key() != before
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "SOURCE_HASH", "of other kernels")
    assert case.key() != before


@contextmanager
def precision(backend, value):
    before = backend.fp32_precision
    backend.fp32_precision = value
    yield
    backend.fp32_precision = before


def test_settings_of_torch_show():
    case = Case()
    before = case.key()
    for backend in (torch.backends.mkldnn.conv, torch.backends.cuda.matmul):
        with precision(backend, "ieee"):
            assert case.key() != before
    with torch.autocast("cpu", torch.bfloat16):
        assert case.key() != before
    assert case.key() == before


SCRIPT = """
import sys
sys.path[:0] = ["tests/support", "tests/statistics"]
import torch
torch.manual_seed(4)
from test_key import Case
print(Case().key())
"""


def test_another_process_finds_the_same():
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", SCRIPT]
    other = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    torch.manual_seed(4)
    assert Case().key() == other.stdout.strip()


def test_no_two_sequences_are_alike():
    sequences = [("ab", "c"), ("a", "bc"), ("abc",), (), ("",), (1,), ("1",), (1.0,)]
    sequences += [(1, 1), (11,), (-1, -1), ([1],), (1, None)]
    tensors = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3).int()]
    sequences += [(t,) for t in tensors] + [(torch.zeros(2, 3), torch.zeros(0))]
    assert len({hash_of(*values) for values in sequences}) == len(sequences)
