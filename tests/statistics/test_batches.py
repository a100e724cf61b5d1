"""Batches at the door, and errors of the model that name them."""

import warnings

import pytest
import torch
from nets import data
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fisherprune as fp
from fisherprune.statistics.batches import Batch, checked_batches, running
from fisherprune.statistics.structure import tensors_in

CPU = torch.device("cpu")


def passed(batches, **options):
    return [b.content for b in checked_batches(batches, CPU, **options)]


def test_both_forms_are_copied():
    x, y = data((3,))
    for batch, labelled in (((x, y), True), ({"x": x, "y": [y, None]}, False)):
        (found,) = passed([batch], labelled=labelled)
        pairs = zip(tensors_in(found), (x, y), strict=True)
        assert type(found) is type(batch)
        assert all(t.equal(u) and t.data_ptr() != u.data_ptr() for t, u in pairs)


def test_batches_of_any_structure_come_one_by_one():
    batches = [{"x": torch.randn(n, 2)} for n in (3, 1, 2)]
    assert [len(b["x"]) for b in passed(iter(batches), labelled=False)] == [3, 1, 2]
    assert passed([], labelled=False) == []


@pytest.mark.parametrize(
    "batches, labelled, match",
    [
        (3, True, r"an iterable of \(inputs, labels\) tensors, got int"),
        (3, False, "batches must be an iterable of batches, got int"),
        (
            [{"x": torch.zeros(2)}],
            True,
            r"dict of \(x: Tensor \[2\]\): for .* give losses",
        ),
        ([(torch.zeros(2), 1)], True, r"batch 0 is tuple of \(Tensor \[2\], int\)"),
        ([(torch.zeros(2),) * 3], True, "must yield .inputs, labels. tensors, samples"),
        ([(torch.zeros(2), torch.zeros(3))], True, "got 2 inputs and 3 labels"),
        ([(torch.zeros(0, 3), torch.zeros(0))], True, "got 0 inputs and 0 labels"),
        ([torch.zeros(2), "text"], False, "batch 1: a batch must hold tensors .* str"),
        ([{"n": 1}], False, r"batch 0: .* samples first, got dict of \(n: int\)"),
    ],
)
def test_what_is_no_batch(batches, labelled, match):
    with pytest.raises(fp.FisherpruneError, match=match):
        passed(batches, labelled=labelled)


def quantized(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, which gives it up
        return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)


def nested(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([*x])


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    "change, kind",
    [
        (torch.Tensor.to_sparse, "sparse_coo"),
        (torch.Tensor.to_sparse_csr, "sparse_csr"),
        (lambda x: x.to("meta"), "meta"),
        (nested, "nested"),
        (quantized, "quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_without_usable_data(change, kind, labelled):
    x, y = data((3,))
    good, bad = ((x, y), (change(x), y))
    if not labelled:
        good, bad = ({"x": x}, {"x": change(x)})
    place = "inputs" if labelled else "x"
    match = f"batch 1: tensors must be dense and .* got {place} of kind {kind}$"
    with pytest.raises(fp.FisherpruneError, match=match):
        passed([good, bad], labelled=labelled)


@pytest.mark.parametrize("labelled", [True, False])
def test_packed_batches(labelled):
    batch = pack_sequence([torch.randn(3, 2), torch.randn(1, 2)]), torch.zeros(2)
    with pytest.raises(fp.FisherpruneError, match="batch 0: .* got a PackedSequence"):
        passed([batch], labelled=labelled)


def conv(x):
    return nn.Conv2d(3, 4, 3)(x)


IMAGE = torch.randn(8, 3, 9, 9)


@pytest.mark.parametrize(
    "inputs, came, reason",
    [
        (IMAGE.double(), r"float64 \[8, 3, 9, 9\]", "[Dd]ouble"),
        (IMAGE.half(), r"float16 \[8, 3, 9, 9\]", "[Hh]alf"),
        (IMAGE.long(), r"int64 \[8, 3, 9, 9\]", "[Ll]ong"),
        (IMAGE > 0, r"bool \[8, 3, 9, 9\]", "[Bb]ool"),
        (IMAGE.cfloat(), r"complex64 \[8, 3, 9, 9\]", "[Cc]omplex|[Ff]loat"),
        (IMAGE[..., :2], r"float32 \[8, 3, 9, 2\]", "Kernel size"),
        (IMAGE[:, :2], r"float32 \[8, 2, 9, 9\]", "channels"),
    ],
)
def test_inputs_that_a_model_fails_on(inputs, came, reason):
    match = rf"^op: the model failed on batch 3 \(inputs {came}\): .*({reason}).*$"
    with pytest.raises(fp.FisherpruneError, match=match) as caught:
        with running("op", Batch(inputs, len(inputs), 3)):
            conv(inputs)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "\n" not in str(caught.value)


def test_batches_are_named_by_their_tensors():
    ids, labels = torch.zeros(4, 6, dtype=torch.long), torch.zeros(4)
    for batch, came in (
        ((ids, labels), r"inputs int64 \[4, 6\], labels float32 \[4\]"),
        ({"ids": ids, "more": [1, labels]}, r"ids int64 .*, more.1 float32 \[4\]"),
        ([labels] * 5, r"(\d float32 \[4\], ){4}\.\.\."),
    ):
        with pytest.raises(fp.FisherpruneError, match=rf"batch 0 \({came}\): ValueErr"):
            with running("op", Batch(batch, 1)):
                raise ValueError("why")


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("first\nsecond"), "first"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("labels"), "KeyError: 'labels'"),
        (StopIteration(), "StopIteration"),
    ],
)
def test_the_first_line_is_shown(error, said):
    with pytest.raises(fp.FisherpruneError, match=rf"\(\): {said}$") as caught:
        with running("op", Batch(None, 1)):
            raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(2),
        fp.FisherpruneError("why"),
        fp.FisherpruneWarning("turned into an error"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_is_no_failure_of_the_model_passes(error):
    with pytest.raises(type(error)) as caught, running("op", Batch(None, 1)):
        raise error
    assert caught.value is error


def test_complex_inputs_are_the_models_matter():
    x = torch.randn(4, 3, dtype=torch.cfloat)
    ((found, _),) = passed([(x, torch.zeros(4))])
    assert found.equal(x)
