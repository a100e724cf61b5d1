"""Zeros cut from one slab in huge pages, and what stands in for it."""

import gc
import io
import mmap
import pickle
import weakref

import pytest
import torch

from fisherprune import memory

SHAPES = {"a": (700, 1000), "odd": (3, 7), "empty": (0, 4), "b": (1024, 513)}


@pytest.fixture
def tensors():
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def slabs(monkeypatch):
    """Record the slabs that are made."""
    made, slab = [], memory._slab

    def recorded(size):
        made.append(slab(size))
        return made[-1]

    monkeypatch.setattr(memory, "_slab", recorded)
    return made


needs_slabs = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages"
)


def check(zeros, tensors):
    assert list(zeros) == list(tensors)
    for name, z in zeros.items():
        like = tensors[name]
        assert (z.shape, z.dtype, z.device) == (like.shape, like.dtype, like.device)
        assert z.is_contiguous() and not z.requires_grad and not z.any()


@needs_slabs
def test_slices_are_aligned_zeros_that_do_not_overlap(tensors, slabs):
    zeros = memory.zeros_like(tensors)
    assert len(slabs) == 1
    check(zeros, tensors)
    filled = [z for z in zeros.values() if z.numel()]
    assert all(z.data_ptr() % memory.ALIGNMENT == 0 for z in filled)
    assert filled[0].data_ptr() % memory.HUGE_PAGE == 0
    for i, z in enumerate(zeros.values()):
        z.fill_(i + 1)
    for i, z in enumerate(zeros.values()):
        assert (z == i + 1).all()


@needs_slabs
def test_a_slab_lives_until_its_last_tensor_is_gone(tensors, monkeypatch):
    mappings = []

    class Mapping(mmap.mmap):
        def __new__(cls, *args):
            mapping = super().__new__(cls, *args)
            mappings.append(weakref.ref(mapping))
            return mapping

    monkeypatch.setattr(mmap, "mmap", Mapping)
    last = memory.zeros_like(tensors)["odd"]
    gc.collect()
    assert mappings[0]() is not None
    assert (last + 1 == 1).all()
    del last
    gc.collect()
    assert mappings[0]() is None


@needs_slabs
def test_saving_one_tensor_writes_its_bytes_alone(tensors, slabs):
    odd = memory.zeros_like(tensors)["odd"].fill_(3)
    assert slabs
    file = io.BytesIO()
    torch.save(odd, file)
    assert file.tell() < 8_000
    file.seek(0)
    assert torch.equal(torch.load(file), odd)
    assert torch.equal(pickle.loads(pickle.dumps(odd)), odd)
    assert odd.untyped_storage().nbytes() == odd.nbytes


@pytest.mark.parametrize("missing", ["flag", "call"])
def test_without_huge_pages_they_are_ordinary_zeros(tensors, monkeypatch, missing):
    def refuse(*_):
        raise OSError("no huge pages")

    if missing == "flag":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "mmap", refuse)
    check(memory.zeros_like(tensors), tensors)


def test_small_and_other_devices_tensors_are_ordinary(tensors, slabs):
    small = {"w": torch.randn(5, 6).mT, "s": torch.randn(())}
    check(memory.zeros_like(small), small)
    meta = {name: t.to("meta") for name, t in tensors.items()}
    zeros = memory.zeros_like(meta)
    assert all(z.device.type == "meta" for z in zeros.values())
    assert slabs == []


@needs_slabs
def test_parameters_of_other_strides_and_with_gradients(slabs):
    weight = torch.randn(64, 128, 12, 12).to(memory_format=torch.channels_last)
    parameters = {"w": torch.nn.Parameter(weight)}
    check(memory.zeros_like(parameters), parameters)
    assert len(slabs) == 1
