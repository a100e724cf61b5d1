"""Batches of any structure: types are kept, samples are found and cut."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fisherprune as fp
from fisherprune.statistics.structure import (
    count_samples,
    described,
    map_tensors,
    moved,
    named_tensors,
    repeated,
    some_samples,
    tensors_in,
)

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: object
    y: object
    total: object = field(init=False)

    def __post_init__(self):
        self.total = len(self.x)


@dataclass(frozen=True)
class Frozen:
    x: object
    y: object


STRUCTURES = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named tuple": Pair,
    "dict": lambda x, y: {"x": x, 3: y},
    "ordered": lambda x, y: OrderedDict(x=x, y=y),
    "default": lambda x, y: defaultdict(list, x=x, y=y),
    "user": lambda x, y: UserDict(x=x, y=y),
    "read-only": lambda x, y: MappingProxyType({"x": x, "y": y}),
    "dataclass": Record,
    "frozen": Frozen,
    "nested": lambda x, y: {"a": [Frozen(x, None), "text"], "b": (Pair(3, y),)},
}


def same_structure(one, other):
    """Return whether two batches are alike but for their tensors' values."""
    names = [[name for name, _ in named_tensors(batch)] for batch in (one, other)]
    return type(one) is type(other) and names[0] == names[1]


@pytest.fixture(params=STRUCTURES)
def make(request):
    return STRUCTURES[request.param]


def test_structures_are_kept(make):
    x, y = torch.randn(4, 3), torch.randint(5, (4,))
    batch = make(x, y)
    doubled = map_tensors(lambda t: 2 * t, batch)
    assert same_structure(batch, doubled) and doubled is not batch
    assert [*map(id, tensors_in(batch))] == [id(x), id(y)]
    for before, after in zip(tensors_in(batch), tensors_in(doubled), strict=True):
        assert after.equal(2 * before)
    if hasattr(doubled, "total"):
        assert doubled.total == 4


def test_samples_are_cut_one_by_one(make):
    samples = 6
    x, y = torch.randn(samples, 3), torch.randint(5, (samples,))
    batch = make(x, y)
    assert count_samples(batch) == samples
    last = tensors_in(some_samples(batch, slice(-1, None)))
    assert last[0].equal(x[-1:]) and last[1].equal(y[-1:])
    ones = [some_samples(batch, slice(i, i + 1)) for i in range(samples)]
    assert all(same_structure(one, batch) and count_samples(one) == 1 for one in ones)
    joined = [torch.cat(parts) for parts in zip(*map(tensors_in, ones), strict=True)]
    assert joined[0].equal(x) and joined[1].equal(y)


def test_samples_twice(make):
    x, y = torch.randn(1, 3), torch.randint(5, (1,))
    found = tensors_in(repeated(make(x, y)))
    assert found[0].equal(torch.cat([x, x])) and found[1].equal(torch.cat([y, y]))


def test_a_lone_tensor_is_a_batch():
    x = torch.randn(4, 3)
    assert count_samples(x) == 4 and some_samples(x, slice(1, 2)).equal(x[1:2])


def test_what_has_no_samples_is_kept():
    scale, table, x = torch.tensor(2.0), torch.randn(9, 2), torch.randn(4, 3)
    batch = {"table": table, "x": x, "y": x[:, 0], "scale": scale, "n": 4, "none": None}
    assert count_samples(batch) == 4
    one = some_samples(batch, slice(0, 1))
    assert one["table"] is table and one["scale"] is scale
    assert one["x"].equal(x[:1]) and one["n"] == 4 and one["none"] is None


def test_the_first_of_as_many_lengths_counts():
    x, y = torch.zeros(4, 3), torch.zeros(6)
    assert count_samples((x, y)) == 4 and count_samples((y, x)) == 6
    assert count_samples((y, x, x)) == 4


def test_what_holds_no_tensor_is_handed_on():
    for batch in (None, 3, "text", [1, 2], {"a": ("b",)}, torch.Size([1]), Record):
        assert map_tensors(torch.neg, batch) is batch
        assert tensors_in(batch) == []


@pytest.mark.parametrize(
    "batch, came",
    [
        ({}, r"dict of \(\)"),
        ("text", "str"),
        (None, "NoneType"),
        ([1, {"a": None}], r"list of \(int, dict of \(a: NoneType\)\)"),
        ({"x": torch.tensor(3.0)}, r"dict of \(x: Tensor \[\]\)"),
        ((torch.zeros(0, 3), torch.zeros(0)), r"tuple of \(Tensor \[0, 3\], Tensor"),
        (Frozen(1, 2), r"Frozen of \(x: int, y: int\)"),
    ],
)
def test_batches_without_samples(batch, came):
    match = f"hold tensors with at least one sample, samples first, got {came}"
    for function in (count_samples, repeated, lambda b: some_samples(b, slice(1))):
        with pytest.raises(fp.FisherpruneError, match=match):
            function(batch)


def test_packed_sequences_are_refused():
    packed = pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    match = "must keep the samples apart, got a PackedSequence: give padded tensors"
    for function in (count_samples, tensors_in, lambda b: moved(b, CPU)):
        with pytest.raises(fp.FisherpruneError, match=match):
            function({"x": packed})
    assert described((packed, 1)) == "tuple of (PackedSequence, int)"


def test_what_came_is_said_in_short():
    batch = [torch.zeros(8, 3), Pair(1, "a"), *range(3)]
    expected = "list of (Tensor [8, 3], Pair of (x: int, y: str), int, int, ...)"
    assert described(batch) == expected


def test_moved_tensors_are_copies(make):
    x, y = torch.randn(4, 3), torch.randint(5, (4,))
    before = x.clone(), y.clone()
    there = moved(make(x, y), CPU)
    assert same_structure(there, make(x, y))
    for tensor in tensors_in(there):
        tensor.zero_()
    assert x.equal(before[0]) and y.equal(before[1])


def test_moved_tensors_may_be_saved_by_autograd():
    with torch.inference_mode():
        x = torch.randn(4, 3)
    there = moved({"x": x}, CPU)["x"]
    assert not there.is_inference() and there.equal(x)
    (there @ torch.randn(3, 2, requires_grad=True)).sum().backward()


def test_moved_tensors_have_no_part_in_the_graph_of_the_users():
    x = torch.randn(4, 3, requires_grad=True)
    (there,) = moved([2 * x], CPU)
    assert there.is_leaf and there.requires_grad
    there.sum().backward()
    assert x.grad is None


def test_moved_tensors_lie_on_the_device():
    batch = {"x": torch.randn(4, 3), "n": [torch.randn(4), 1]}
    there = moved(batch, torch.device("meta"))
    assert all(t.is_meta for t in tensors_in(there)) and there["n"][1] == 1


def test_tokenizers_batches_keep_their_type():
    hf = pytest.importorskip("transformers")
    batch = hf.BatchEncoding({"input_ids": torch.randint(9, (4, 5)), "text": "a"})
    one = some_samples(batch, slice(-1, None))
    assert type(one) is hf.BatchEncoding and one["text"] == "a"
    assert one.input_ids.equal(batch.input_ids[-1:]) and len(batch.input_ids) == 4
    assert count_samples(batch) == 4 and type(moved(batch, CPU)) is hf.BatchEncoding
