"""What statistics depend on changes their fingerprint, and nothing else does."""

import copy
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from nets import batches, conv_net, data
from torch import nn

import fisherprune as fp
from fisherprune.statistics.fingerprint import Digest, fingerprint


class Case:
    """A network and data, and their fingerprint after a change."""

    def __init__(self):
        self.model = conv_net()
        self.model.append(nn.Dropout(0.5))
        self.x, self.y = torch.randn(7, 3, 9, 9), torch.randint(5, (7,))
        self.size, self.options = 3, {}
        self.skip = None

    def fingerprint(self):
        return fingerprint(
            self.model,
            batches(self.x, self.y, self.size),
            fp.prunable_parameters(self.model, self.skip),
            **self.options,
        )


def _flip_lowest_bit(tensor):
    tensor.detach().view(torch.int32).view(-1)[5:6].bitwise_xor_(1)


def _swap(tensor):
    tensor[[1, 2]] = tensor[[2, 1]].clone()


def _set(holder, **values):
    for name, value in values.items():
        setattr(holder, name, value)


CHANGES = {
    "a bit of a weight": lambda c: _flip_lowest_bit(c.model[3].weight),
    "a bit of a weight that is not scored": lambda c: _flip_lowest_bit(
        c.model[12].weight
    ),
    "a running mean": lambda c: _flip_lowest_bit(c.model[1].running_mean),
    "a bit of an image": lambda c: _flip_lowest_bit(c.x),
    "a label": lambda c: c.y[6:].add_(1),
    "the order of images": lambda c: (_swap(c.x), _swap(c.y)),
    "an image less": lambda c: _set(c, x=c.x[:-1], y=c.y[:-1]),
    "the batches": lambda c: _set(c, size=4),
    "the labels' type": lambda c: _set(c, y=c.y.int()),
    "the layout of a weight": lambda c: c.model[3].to(
        memory_format=torch.channels_last
    ),
    "the group size": lambda c: c.options.update(group_size=2),
    "the version": lambda c: c.options.update(version="2"),
    "the parameters": lambda c: _set(c, skip=["bias"]),
    "a setting": lambda c: _set(c.model[1], eps=1e-3),
    "a setting in a tuple": lambda c: _set(c.model[3], dilation=(1, 2)),
    "a function": lambda c: _set(c.model[2], f=torch.tanh),
    "a tensor that is no buffer": lambda c: _set(c.model[2], f=torch.ones(2)),
    "a layer without weights": lambda c: c.model.__setitem__(2, nn.Tanh()),
    "a hook": lambda c: c.model[2].register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(change):
    case = Case()
    case.model[2].f, case.y = torch.relu, case.y.clamp(max=3)
    before = case.fingerprint()
    assert copy.deepcopy(case).fingerprint() == before
    CHANGES[change](case)
    assert case.fingerprint() != before


def test_which_parameter_a_name_is_of_shows():
    model, (x, y) = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), data((4,))
    first, second = (
        fingerprint(model, [(x, y)], {"w": layer.weight}) for layer in model
    )
    assert first != second


def test_mode_gradients_and_compilation_do_not_show():
    case = Case()
    before = case.fingerprint()
    case.model.eval()
    case.model(case.x).sum().backward()
    assert case.fingerprint() == before
    parameters = fp.prunable_parameters(case.model)
    compiled = torch.compile(case.model)
    assert fingerprint(compiled, batches(case.x, case.y, 3), parameters) == before


def test_a_pass_does_not_show():
    case = Case()
    before = case.fingerprint()
    fp.score_all(case.model, [(case.x, case.y)], ["fts", "grasp"])
    assert case.fingerprint() == before


@contextmanager
def precision(backend, value):
    before = backend.fp32_precision
    backend.fp32_precision = value
    yield
    backend.fp32_precision = before


def test_settings_of_torch_show():
    case = Case()
    before = case.fingerprint()
    for backend in (torch.backends.mkldnn.conv, torch.backends.cuda.matmul):
        with precision(backend, "ieee"):
            assert case.fingerprint() != before
    with torch.autocast("cpu", torch.bfloat16):
        assert case.fingerprint() != before
    assert case.fingerprint() == before


NET = """
from torch import nn
class Net(nn.Sequential):
    def forward(self, x):
        return super().forward({input})
"""


def test_other_forward_code_shows(tmp_path, monkeypatch):
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    weights, found = None, []
    monkeypatch.syspath_prepend(tmp_path)
    for code in ("x", "x.abs()"):
        (tmp_path / "edited_net.py").write_text(NET.format(input=code))
        sys.modules.pop("edited_net", None)
        import edited_net

        model = edited_net.Net(nn.Linear(4, 4), nn.Linear(4, 2))
        weights = weights or copy.deepcopy(model.state_dict())
        model.load_state_dict(weights)
        parameters = fp.prunable_parameters(model)
        found.append(fingerprint(model, [(x, y)], parameters))
    assert found[0] != found[1]


SCRIPT = """
import sys; sys.path.insert(0, "tests/support")
import torch
torch.manual_seed(4)
from test_fingerprint import Case
print(Case().fingerprint())
"""


def test_another_process_finds_the_same():
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", SCRIPT]
    other = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    torch.manual_seed(4)
    assert Case().fingerprint() == other.stdout.strip()


def test_no_two_sequences_are_alike():
    sequences = [("ab", "c"), ("a", "bc"), ("abc",), (), ("",), (1,), ("1",), (1.0,)]
    sequences += [(1, 1), (11,), (-1, -1), ([1],), (1, None)]
    tensors = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3).int()]
    sequences += [(t,) for t in tensors] + [(torch.zeros(2, 3), torch.zeros(0))]
    digests = set()
    for values in sequences:
        digest = Digest()
        digest.add(*values)
        digests.add(digest.hexdigest())
    assert len(digests) == len(sequences)
