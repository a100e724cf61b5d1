"""What a model holds beside tensors is read to the end, or said to be unreadable."""

import dataclasses
import enum
import functools
import math
import re
import types

import pytest
import torch
import torch.nn.functional as F
from nets import conv_net
from torch import nn

from fisherprune.statistics.contents import Reader, UnreadableError


def read(value):
    model = conv_net()[2]
    model.held = value
    return [repr(v) for v in Reader().read(model)]


@dataclasses.dataclass
class Config:
    slope: object
    inner: object = None


class Slotted:
    __slots__ = ("__hidden", "seen")

    def __init__(self, hidden):
        self.__hidden = hidden


class Kind(enum.Enum):
    HOT = 1
    COLD = 2


class Method:
    def __init__(self, factor):
        self.factor = factor

    def times(self, x):
        return self.factor * x


def scaled(factor, scale=1):
    return lambda x: factor * scale * x


def defaulted(factor):
    def times(x, by=factor, *, plus=0):
        return x * by + plus

    return times


PAIRS = {
    "partial's keyword": lambda v: functools.partial(F.leaky_relu, negative_slope=v),
    "partial's argument": lambda v: functools.partial(math.pow, v),
    "an object": Config,
    "an object's object": lambda v: [Config(0, {"deep": Config(v)})],
    "a slot": Slotted,
    "a bound method": lambda v: Method(v).times,
    "a closure": scaled,
    "a default": defaulted,
    "a set": lambda v: {v, 7.0},
    "a tensor in an object": lambda v: Config(torch.tensor(v)),
    "a module in an object": lambda v: Config(nn.LeakyReLU(v)),
    "a generator": lambda v: torch.Generator().manual_seed(int(100 * v)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_what_is_held_shows(kind):
    make = PAIRS[kind]
    assert read(make(0.25)) == read(make(0.25)) != read(make(0.5))


@pytest.mark.parametrize(
    "one, other",
    [
        (Kind.HOT, Kind.COLD),
        (torch.float32, torch.float64),
        (F.relu, F.gelu),
        (F.max_pool1d, F.max_pool2d),
        (torch.tanh, torch.relu),
        (math.sin, math.cos),
        (math, re),
        (nn.ReLU, nn.Tanh),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x.sin(), lambda x: x.cos()),
        ([1, 2], (1, 2)),
        ([[1], 2], [[1, 2]]),
        (1, True),
        (None, "None"),
    ],
)
def test_unlike_things_differ(one, other):
    assert read(one) == read(one) != read(other)


def test_what_is_met_again_is_told_from_a_copy():
    config, module = Config(1), nn.Linear(2, 2)
    assert read([config, config]) != read([config, Config(1)])
    module.held = [module]  # and ends
    assert list(Reader().read(module))


def test_a_method_put_on_later_shows(monkeypatch):
    def twice(self, x):
        return 2 * x

    before = read(Method(1))
    monkeypatch.setattr(Method, "times", twice)
    patched = read(Method(1))
    one = Method(1)
    one.times = types.MethodType(scaled(3), one)
    assert len({tuple(seen) for seen in (before, patched, read(one))}) == 3


def typed_in(body="return x"):
    names = {"nn": nn, "__name__": __name__}
    exec(f"class Net(nn.Module):\n def forward(self, x): {body}", names)
    return names["Net"]


class Text(str):
    pass


def chain(length):
    link = None
    for _ in range(length):
        link = Config(link)
    return link


@pytest.mark.parametrize(
    "value, what",
    [
        (typed_in()(), f"the code of {__name__}.Net"),
        (typed_in(), f"the code of {__name__}.Net"),
        (eval("lambda x: x"), "the code of <lambda>"),
        (types.ModuleType("made_up"), "the code of .*made_up"),
        (re.compile("x"), "an object re.Pattern"),
        (object(), "an object builtins.object"),
        (Text("x"), "an object test_contents.Text"),
        ("x".join, "the compiled code of str.join"),
        (torch.eye(2).to_sparse(), "a tensor torch.Tensor"),
        (chain(2000), "a chain of objects that is too long"),
    ],
)
def test_what_cannot_be_read_is_said(value, what):
    with pytest.raises(UnreadableError, match=what):
        read(Config(value))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_compiled_modules_cannot_be_read():
    with pytest.raises(UnreadableError, match="the compiled code of .*ScriptModule"):
        read(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))
