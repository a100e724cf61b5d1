"""Models of the families in use, against a loop over single samples in float64."""

import copy
import warnings

import families
import languages
import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments
from families import CLASSES, shaken
from nets import Own
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fisherprune as fp
from fisherprune.statistics.structure import map_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

LOOPED = {
    # parameters whose gradients may come from samples that run alone
    "mixtral": ".experts.",
    "own function": "scale",
    "sorted": "",  # samples are in another order than the batch's
}


def assert_exact(name, model, batches, losses, parameters=None):
    """Compare with the loop, groups of one and of three that run on across batches.

    In float64, for some of these models let rounding errors grow; grouped products of
    matrices, of experts, are float32's alone.
    """
    if name != "mixtral":
        model, batches = in_double(model, batches)
    named = parameters or dict(model.named_parameters())
    expected = truth.moments_of_losses(model, batches, [*named], losses, (1, 3))
    for group_size, moments in expected.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fp.FisherpruneWarning)
            found = fp.gradient_moments(
                model, batches, losses=losses, parameters=named, group_size=group_size
            )
        assert_close(found, moments, 1e-5)
        looped = {n for n, ways in found.paths.items() if ways == ("loop",)}
        assert all(LOOPED.get(name, "nothing") in each for each in looped), looped
    return found


def in_double(model, batches):
    return model.double(), [map_tensors(truth.in_float64, each) for each in batches]


def assert_close(found, expected, tolerance):
    """Compare where the gradient is not zero but for rounding: no biases of keys."""
    largest = max(float(fisher.max()) for _, fisher in expected.values())
    known = {n: m for n, m in expected.items() if float(m[1].max()) > 1e-20 * largest}
    assert len(known) > len(expected) / 2
    assert_moments(found, known, tolerance)


@pytest.mark.parametrize("name", families.VISION)
def test_vision(name):
    model, batches = families.VISION[name]()
    assert_exact(name, model, batches, fp.losses.classification)


@pytest.mark.parametrize("name", languages.LANGUAGE)
def test_language(name):
    make, batches, losses = languages.LANGUAGE[name]
    assert_exact(name, make(), batches(), losses)


@pytest.mark.parametrize("experts", ["batched_mm", "eager"])
def test_experts(experts):
    model = languages.mixtral()
    model.config._experts_implementation = experts
    batches = languages.of_tokens()
    found = assert_exact("mixtral", model, batches, fp.losses.next_token)
    assert found.paths["lm_head.weight"] == ("linear",)


def test_adapters_alone():
    model = languages.adapted()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert own and all("lora" in name for name in own)
    arguments = languages.of_tokens(), fp.losses.next_token, own
    found = assert_exact("adapters", model, *arguments)
    assert {*found.paths.values()} == {("linear",)}
    assert not any(p.grad is not None for p in model.parameters())


def test_a_frozen_base_by_name():
    model = languages.adapted()
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    arguments = languages.of_tokens(), fp.losses.next_token, frozen
    assert_exact("adapters", model, *arguments)
    assert not any(p.requires_grad for p in frozen.values())


def sequences(features=6):
    """Return sequences of several lengths, which are the batch's last part."""
    return [
        {
            "x": torch.randn(n, 7, features),
            "lengths": torch.randint(1, 8, (n,)),
            "labels": torch.randint(CLASSES, (n,)),
        }
        for n in (2, 4)
    ]


def packed(m, batch, is_sorted):
    """Classify by the outputs of a recurrent layer of packed sequences."""
    x, lengths = batch["x"], batch["lengths"]
    order = lengths.argsort(descending=True) if is_sorted else torch.arange(len(x))
    rows = pack_padded_sequence(
        x[order], lengths[order], batch_first=True, enforce_sorted=is_sorted
    )
    outputs, _ = pad_packed_sequence(m.layer(rows)[0], batch_first=True)
    return m.head(torch.tanh(outputs.sum(1)))[order.argsort()]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("is_sorted", [False, True])
def test_packed_sequences(kind, is_sorted):
    model = Own(
        lambda m, batch: packed(m, batch, is_sorted),
        layer=kind(6, 5, 2, batch_first=True, bidirectional=True),
        head=nn.Linear(10, CLASSES),
    )

    def losses(model, batch):
        return F.cross_entropy(model(batch), batch["labels"], reduction="none")

    name = "sorted" if is_sorted else ""
    assert_exact(name, shaken(model), sequences(), losses)


def message_passing(m, x):
    """Pass messages along the edges of a ring with chords: inputs ``[N, nodes, 6]``."""
    nodes = x.shape[1]
    source = torch.arange(nodes).repeat(2)
    target = torch.cat([torch.arange(nodes).roll(1), torch.arange(nodes).roll(3)])
    for layer, update in zip(m.layers, m.updates, strict=True):
        messages = torch.tanh(layer(torch.cat([x[:, source], x[:, target]], 2)))
        index = target[None, :, None].expand_as(messages)
        sums = torch.zeros_like(x).scatter_add(1, index, messages)
        sums = sums.index_add(1, target, messages * m.gate)
        x = x + torch.tanh(update(sums))
    return m.head(x.mean(1))


def test_a_graph():
    model = Own(
        message_passing,
        layers=nn.ModuleList(nn.Linear(12, 6) for _ in range(2)),
        updates=nn.ModuleList(nn.Linear(6, 6) for _ in range(2)),
        gate=nn.Parameter(torch.randn(6)),
        head=nn.Linear(6, CLASSES),
    )
    batches = [(torch.randn(n, 5, 6), torch.randint(CLASSES, (n,))) for n in (2, 3)]
    assert_exact("graph", model, batches, fp.losses.classification)


class Scaled(torch.autograd.Function):
    """``x * exp(scale)`` with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale.exp()

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale.exp(), (grad * x * scale.exp()).flatten(0, -2).sum(0)


def test_a_function_of_ones_own():
    model = Own(
        lambda m, x: m.head(torch.tanh(Scaled.apply(m.fc(x), m.scale)).mean(1)),
        fc=nn.Linear(6, 6),
        scale=nn.Parameter(torch.randn(6)),
        head=nn.Linear(6, CLASSES),
    )
    batches = [(torch.randn(n, 4, 6), torch.randint(CLASSES, (n,))) for n in (2, 3)]
    found = assert_exact("own function", model, batches, fp.losses.classification)
    assert found.paths["scale"] == ("loop",)


def small_vit():
    return in_double(*families.VISION["timm vit"]())


def test_a_compiled_model():
    model, batches = small_vit()
    compiled = torch.compile(copy.deepcopy(model))
    named = dict(model.named_parameters())
    expected = fp.gradient_moments(model, batches, parameters=named)
    found = fp.gradient_moments(
        compiled, batches, parameters=dict(compiled._orig_mod.named_parameters())
    )
    assert_close(
        found, {n: (expected.mean[n], expected.fisher[n]) for n in named}, 1e-6
    )


def test_a_distributed_model(tmp_path):
    model, batches = small_vit()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        named = dict(wrapped.named_parameters())
        found = fp.gradient_moments(wrapped, batches, parameters=named)
    finally:
        torch.distributed.destroy_process_group()
    names = dict(model.named_parameters())
    expected = truth.moments_of_losses(
        model, batches, [*names], fp.losses.classification, (1,)
    )[1]
    assert_close(found, {f"module.{n}": m for n, m in expected.items()}, 1e-5)
