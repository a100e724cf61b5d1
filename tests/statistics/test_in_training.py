"""Moments beside a training step: against the gradients of single samples."""

import copy
import doctest
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
import truth
from nets import Own, SequenceNet, TwiceNet, conv_net
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fisherprune as fp

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, CLASSES = 11, 5


class Texts(nn.Module):
    """Attention with dropout, a token in front, learned positions, a tied head."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(TOKENS, 8)
        self.places = nn.Parameter(torch.randn(5, 8))
        self.front = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, TOKENS)
        self.head.weight = self.words.weight

    def forward(self, x):
        x = self.words(x) + self.places
        x = torch.cat([self.front.expand(len(x), -1, -1), x], 1)
        return self.head(self.layers(x)[:, 0])


class States(nn.Module):
    """Two recurrent layers with dropout between; the states have no samples first."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, 6, 2, dropout=0.3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        outputs, (state, _) = self.layer(x.mT.transpose(0, 1))
        return {"outputs": self.head(outputs.mean(0)), "state": state}


def coded(m, x):
    """Look up what values of the samples choose: then each batch is checked."""
    x = m.first(x.mT)
    return m.last(m.words(x.argmax(-1)).mean(1) + x.mean(1))


def words(first, *others):
    return nn.Sequential(first, nn.Flatten(), nn.Dropout(), nn.Linear(40, CLASSES))


def by_class(model, batch):
    x, y = batch
    found = model(x)
    outputs = found["outputs"] if isinstance(found, dict) else found
    return F.cross_entropy(outputs, y, reduction="none")


def in_bfloat16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return by_class(model, batch).float()


def images(n):
    return torch.randn(n, 3, 9, 9), torch.randint(CLASSES, (n,))


def series(n, channels=4, length=12):
    return torch.randn(n, channels, length), torch.randint(CLASSES, (n,))


def tokens(n):
    return torch.randint(TOKENS, (n, 5)), torch.randint(CLASSES, (n,))


def tied(n):
    return torch.randn(n, 4, 8, 8), torch.randint(CLASSES, (n,))


def dense(dtype=torch.float32):
    """Return a network of two weights, for rows of four features."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def rows(n=5):
    return torch.randn(n, 4), torch.randint(3, (n,))


MODELS = {
    "convolutions": (lambda: conv_net().eval(), images),
    "conv1d": (SequenceNet, series),
    "several uses": (lambda: TwiceNet().eval(), tied),
    "attention": (Texts, tokens),
    "recurrent": (States, series),
    "parametrized": (
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Conv1d(4, 3, 3)),
            *(nn.Flatten(), nn.Dropout(), nn.LayerNorm(30), nn.Linear(30, CLASSES)),
        ),
        series,
    ),
    "codes": (
        lambda: Own(
            coded,
            **{"first": nn.Linear(4, 8), "words": nn.Embedding(8, 8)},
            last=nn.Linear(8, CLASSES),
        ),
        series,
    ),
    "sparse lookups": (lambda: words(nn.Embedding(TOKENS, 8, sparse=True)), tokens),
    "scaled lookups": (lambda: words(nn.Embedding(TOKENS, 8, max_norm=1.0)), tokens),
}
TO_ROUNDING = "recurrent"


def single(model, batch, losses=by_class):
    """Return what a training step does: the gradients of its samples, by name.

    They are of one graph, so dropout is the same.
    """
    model = copy.deepcopy(model)
    named, options = dict(model.named_parameters()), {"materialize_grads": True}
    found = [
        torch.autograd.grad(loss, [*named.values()], retain_graph=True, **options)
        for loss in losses(model, batch)
    ]
    return {
        name: torch.stack([grads[i].to_dense().double() for grads in found])
        for i, name in enumerate(named)
    }


def plain(model, batch, losses=by_class):
    """Return each ``.grad`` after an ordinary backward pass."""
    model = copy.deepcopy(model)
    losses(model, batch).mean().backward()
    return {n: p.grad for n, p in model.named_parameters()}


def assert_fisher(found, gradients, tolerance=1e-5):
    largest = max(float(g.square().sum()) for g in gradients.values())
    for name, g in gradients.items():
        error = (found.fisher[name].double() - g.square().mean(0)).norm()
        assert error <= tolerance * g.square().mean(0).norm() + 1e-9 * largest, name
        error = (found.mean[name].double() - g.mean(0)).norm()
        assert error <= tolerance * math.sqrt(g.square().sum() + 1e-9 * largest), name


def assert_same(model, grads, tolerance=0.0):
    for name, p in model.named_parameters():
        assert p.grad.layout == grads[name].layout
        ours, theirs = p.grad.to_dense(), grads[name].to_dense()
        assert (ours - theirs).norm() <= tolerance * (1 + theirs.norm()), name


def step(context, model, batch, losses=by_class):
    with context:
        losses(model, batch).mean().backward()
    return context.result()


@pytest.mark.parametrize("same_bits", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step(name, same_bits):
    make, batch_of = MODELS[name]
    model, batch, seed = make(), batch_of(6), torch.seed() % 2**31
    model(batch[0])  # what a lookup scales is scaled
    truths = []
    for run in (plain, single):
        torch.manual_seed(seed)
        truths.append(run(model, batch))
        random = torch.get_rng_state()
    before, modes = dict(vars(model)), [m.training for m in model.modules()]
    torch.manual_seed(seed)
    options = {"parameters": dict(model.named_parameters()), "same_bits": same_bits}
    found = step(fp.moments(model, **options), model, batch)
    assert torch.equal(random, torch.get_rng_state())
    assert_fisher(found, truths[1])
    assert (found.samples, found.groups, found.group_size) == (6, 6, 1)
    exact = same_bits and name != TO_ROUNDING
    assert_same(model, truths[0], 0.0 if exact else 1e-5)
    assert vars(model) == before and not vars(batch[0])
    assert [m.training for m in model.modules()] == modes


def test_both_kinds_of_gradients_agree_with_gradient_moments():
    model, batch = conv_net().eval(), images(7)
    named = dict(model.named_parameters())
    found = step(fp.moments(model, parameters=named), model, batch)
    other = fp.gradient_moments(model, [batch], parameters=named)
    assert found.paths == other.paths
    for name, fisher in other.fisher.items():
        assert truth.relative_error(found.fisher[name], fisher.double()) < 1e-5, name


def test_the_same_context_again_and_again():
    model = nn.Sequential(nn.Dropout(0.2), *dense())
    context = fp.moments(model, parameters=dict(model.named_parameters()))
    for n in (5, 3, 1, 5):
        batch, seed = rows(n), torch.seed() % 2**31
        torch.manual_seed(seed)
        expected = single(model, batch)
        torch.manual_seed(seed)
        assert_fisher(step(context, model, batch), expected)


def test_batches_of_a_step_add_up():
    model, (x, y) = dense(), rows(7)
    expected = single(model, (x, y))
    context = fp.moments(
        model, parameters=dict(model.named_parameters()), scale=lambda: 0.5
    )
    with context as m:
        for part in (slice(0, 2), slice(2, 3), slice(3, 7)):
            (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
            assert m.result().samples == part.stop
        with torch.no_grad():
            model(x)  # not part of it
        model[0].weight.square().sum().backward()  # nor is a penalty
    assert_fisher(context.result(), expected)


def test_a_sum_over_samples():
    model, batch = dense(torch.float64), (torch.randn(5, 4).double(), rows()[1])
    expected = single(model, batch)
    options = {"parameters": dict(model.named_parameters()), "reduction": "sum"}
    with fp.moments(model, **options) as m:
        by_class(model, batch).sum().backward()
    assert_fisher(m.result(), expected)
    sums = {name: g.sum(0) for name, g in expected.items()}
    assert_same(model, sums, 1e-12)


def test_scaled_and_clipped():
    model, batch = dense(), rows()
    expected = single(model, batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    named = dict(model.named_parameters())
    with fp.moments(model, parameters=named, scale=scaler.get_scale) as m:
        scaler.scale(by_class(model, batch).mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()
    assert_fisher(m.result(), expected)


def test_under_autocast():
    model, batch = nn.Sequential(*dense(), nn.LayerNorm(3)), rows(6)
    grads, expected = (run(model, batch, in_bfloat16) for run in (plain, single))
    context = fp.moments(model, parameters=dict(model.named_parameters()))
    assert_fisher(step(context, model, batch, in_bfloat16), expected, 3e-2)
    assert_same(model, grads)


def test_training_is_the_same_with_it():
    model, (x, y) = nn.Sequential(nn.Dropout(0.2), *dense()), rows(12)
    weights = []
    for watches in (True, False):
        own = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(own.parameters(), 0.1)
        context = fp.moments(own, same_bits=True)
        torch.manual_seed(1)
        for part in torch.arange(12).split(4):
            optimizer.zero_grad()
            if watches:
                step(context, own, (x[part], y[part]))
            else:
                by_class(own, (x[part], y[part])).mean().backward()
            optimizer.step()
        weights.append([p.detach() for p in own.parameters()])
    assert all(map(torch.equal, *weights))


def test_frozen_layers_hooks_and_inputs():
    model, (x, y) = dense(), rows()
    model[0].requires_grad_(False)
    expected = single(nn.Sequential(*model[1:]), (model[0](x), y))
    seen = []
    model[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    model[1].register_full_backward_hook(lambda *_: seen.append(1))
    inputs = x.clone().requires_grad_()
    with fp.moments(model, parameters={"1.weight": model[2].weight}) as m:
        by_class(model, (inputs, y)).mean().backward()
    assert len(seen) == 2 and model[0].weight.grad is None
    assert_fisher(m.result(), {"1.weight": expected["1.weight"]})
    other = x.clone().requires_grad_()
    by_class(model, (other, y)).mean().backward()
    torch.testing.assert_close(inputs.grad, other.grad)


def test_two_models_at_once():
    first, second, (x, _) = dense(), nn.Linear(3, 2), rows()
    y = torch.randint(2, (5,))
    expected = single(nn.Sequential(first, second), (x, y))
    one, other = ({"parameters": dict(m.named_parameters())} for m in (first, second))
    with fp.moments(first, **one) as a, fp.moments(second, **other) as b:
        F.cross_entropy(second(first(x)), y).backward()
    joined = {f"0.{n}": f for n, f in a.result().fisher.items()}
    joined |= {f"1.{n}": f for n, f in b.result().fisher.items()}
    for name, g in expected.items():
        torch.testing.assert_close(joined[name].double(), g.square().mean(0))


def test_copies_made_inside_are_models_of_their_own():
    model, (x, y) = dense(), rows()
    with fp.moments(model) as m:
        other = copy.deepcopy(model)
        by_class(model, (x, y)).mean().backward()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert m.result().samples == 5 and not other(x).any()


def test_compiled_models_run_as_they_are_written():
    model, batch = dense(), rows()
    compiled = torch.compile(model, backend="eager")
    compiled(batch[0])
    expected = single(model, batch)
    named = dict(model.named_parameters())
    assert_fisher(
        step(fp.moments(compiled, parameters=named), compiled, batch), expected
    )


def test_in_wrappers_of_torch_distributed(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, batch = dense(), rows()
        grads, expected = plain(model, batch), single(model, batch)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for watched in (wrapped, model):
            model.zero_grad()
            options = {"parameters": dict(model.named_parameters())}
            context = fp.moments(watched, **options, same_bits=True)
            assert_fisher(step(context, wrapped, batch), expected)
            assert_same(model, grads)
        from torch.distributed.fsdp import fully_shard

        sharded = fully_shard(dense())
        with pytest.raises(fp.FisherpruneError, match="'0.weight', which is sharded"):
            fp.moments(sharded).__enter__()
    finally:
        distributed.destroy_process_group()


def twice(loss):
    """Run a second pass through what the first one has passed."""
    loss.backward(retain_graph=True)
    loss.backward()


PASSES = {
    "second backward pass": twice,
    "without create_graph": lambda loss: loss.backward(create_graph=True),
    "without inputs": lambda loss: loss.backward(inputs=[torch.ones(1)]),
    r"must be loss.backward\(\)": lambda loss: torch.autograd.grad(loss, [loss.input]),
    "got 2": lambda loss: (loss + loss.again()).backward(),
    "comes from other calls, too.*penalty": lambda loss: (
        loss + loss.size()
    ).backward(),
}


@pytest.mark.parametrize("match", PASSES)
def test_backward_passes_that_are_refused(match):
    model, (x, y) = dense(), rows()
    x.requires_grad_()
    with fp.moments(model) as m:
        loss = by_class(model, (x, y)).mean()
        loss.input = x
        loss.again = lambda: by_class(model, (x, y)).mean()
        loss.size = lambda: model[0].weight.square().sum()
        with pytest.raises(fp.FisherpruneError, match=f"^moments: .*{match}"):
            PASSES[match](loss)
    if match != "second backward pass":  # then the first one counts
        assert model[0].weight.grad is None
        with pytest.raises(fp.FisherpruneError, match="model, got none$"):
            m.result()


def test_a_backward_pass_after_the_end():
    model, (x, y) = dense(), rows()
    early = by_class(model, (x, y)).mean()
    with fp.moments(model) as m:
        early.backward()
        late = by_class(model, (x, y)).mean()
    with pytest.raises(fp.FisherpruneError, match="inside of the context; torch"):
        late.backward()
    with pytest.raises(fp.FisherpruneError, match="model, got none"):
        m.result()


def test_what_fails_inside_is_seen_outside():
    model, (x, y) = dense(), rows()
    context = fp.moments(model)
    with pytest.raises(KeyError, match="mine"), context:
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match="shapes"), context:
        model(x[:, :3])
    handle = model[1].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), context:
        by_class(model, (x, y)).mean().backward()
    with pytest.raises(fp.FisherpruneError, match="got one that failed"):
        context.result()
    handle.remove()
    model.zero_grad()
    assert step(context, model, (x, y)).samples == 5
    assert "forward" not in vars(model)


def test_infinite_gradients():
    model, batch = dense(), rows()
    with fp.moments(model) as m:
        (by_class(model, batch).mean() * 1e30).backward()
    with pytest.raises(fp.FisherpruneError, match="'0.weight' is NaN or infinite"):
        m.result()


def test_squares_below_the_range_of_float32():
    model, batch = dense(), rows()
    with fp.moments(model) as m:
        (by_class(model, batch).mean() * 1e-25).backward()
    with pytest.warns(fp.FisherpruneWarning, match="scale the loss up, and say so"):
        m.result()


def centered(m, x):
    x = m.first(x)
    return m.last(m.drop(x - x.mean(0) if m.training else x))


def shifted(m, x):
    return m.last(m.drop(m.first(x)).roll(1, 0))


def mixed_up(m, x):
    x, order = m.first(x), torch.rand(len(x)).argsort()
    return m.last((x + x[order]) / 2 if m.training else x)


MIXING = {
    "batch norm": (
        "a BatchNorm layer uses batch statistics",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
    ),
    "batch norm and dropout": (
        "a BatchNorm layer uses batch statistics",
        lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 3)),
    ),
    "centered": ("samples mix", lambda: mixing(centered, 0.0)),
    "centered, dropout": ("row that seems to be of one", lambda: mixing(centered, 0.5)),
    "shifted": ("samples mix", lambda: mixing(shifted, 0.5)),
    "mixed up": ("row that seems to be of one", lambda: mixing(mixed_up, 0.0)),
    "reduced": (
        "must have a tensor of floating-point numbers with the samples first",
        lambda: Own(lambda m, x: m.layer(x).mean(0), layer=nn.Linear(4, 3)),
    ),
}


def mixing(run, dropout):
    layers = {"first": nn.Linear(4, 40), "last": nn.Linear(40, 3)}
    return Own(run, drop=nn.Dropout(dropout), **layers)


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_mix(name):
    match, make = MIXING[name]
    model = make().train()
    parameters = dict(model.named_parameters())
    with pytest.raises(fp.FisherpruneError, match=match):
        with fp.moments(model, parameters=parameters):
            model(rows(9)[0])
    assert model.training and "forward" not in vars(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    def run(m, x):
        return m.last(checkpoint(m.first, x, use_reentrant=reentrant))

    model = Own(run, first=nn.Linear(4, 6), last=nn.Linear(6, 3))
    batch = rows()[0].requires_grad_(), rows()[1]
    with pytest.raises(fp.FisherpruneError, match="^moments: activation checkpointing"):
        step(fp.moments(model), model, batch)


def test_tensors_kept_elsewhere():
    model = dense()
    with pytest.raises(fp.FisherpruneError, match="^moments: .*hooks on saved tensors"):
        with save_on_cpu():
            step(fp.moments(model), model, rows())


def test_arguments():
    model = dense()
    for options, match in (
        (
            {"reduction": "none"},
            "moments: reduction must be 'mean' or 'sum', got 'none'",
        ),
        (
            {"scale": 0},
            "moments: scale must be a number above 0, or a function .* got 0",
        ),
        ({"scale": math.inf}, "got inf"),
        ({"same_bits": 1}, "moments: same_bits must be True or False, got 1"),
        ({"parameters": {}}, "at least one parameter"),
    ):
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.moments(model, **options)
    with pytest.raises(fp.FisherpruneError, match="scale must be .* got nan"):
        step(fp.moments(model, scale=lambda: math.nan), model, rows())


def test_models_that_are_refused():
    model = dense()
    with pytest.raises(fp.FisherpruneError, match="watched by one context only"):
        with fp.moments(model), fp.moments(model):
            pass
    context = fp.moments(model)
    model[0].weight.requires_grad_(False)
    with pytest.raises(fp.FisherpruneError, match="got '0.weight', which is frozen"):
        context.__enter__()
    model[0].weight.requires_grad_(True).register_hook(lambda grad: grad)
    with pytest.raises(fp.FisherpruneError, match="must have no gradient hook"):
        context.__enter__()
    several = nn.DataParallel(dense())
    several.device_ids = [0, 1]
    with pytest.raises(fp.FisherpruneError, match="one device, got DataParallel"):
        fp.moments(several).__enter__()


def test_the_example_of_the_docstring():
    result = doctest.testmod(inspect.getmodule(fp.moments))
    assert result.attempted and not result.failed
