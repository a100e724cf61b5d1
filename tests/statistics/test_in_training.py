"""Moments beside a training step: against the gradients of single samples."""

import copy
import doctest
import inspect

import pytest
import torch
import torch.nn.functional as F
import truth
from nets import Own, conv_net
from torch import nn
from training_steps import (
    MODELS,
    TO_ROUNDING,
    assert_fisher,
    assert_same,
    by_class,
    dense,
    images,
    in_bfloat16,
    plain,
    rows,
    single,
    step,
)

import fisherprune as fp

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_tables_that_a_model_keeps_are_those_of_the_step():
    def forward(m, x):
        if "table" not in m.tables:
            m.tables["table"] = m.start.square()
        return m.head(torch.tanh(x + m.tables["table"]))

    start = nn.Parameter(torch.randn(4))
    model, batch = Own(forward, head=nn.Linear(4, 3), start=start, tables={}), rows()
    expected = single(model, batch)
    context = fp.moments(model, parameters=dict(model.named_parameters()))
    assert_fisher(step(context, model, batch), expected)
    assert model.tables["table"].requires_grad and start.grad.any()


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


def test_the_example_of_the_docstring():
    result = doctest.testmod(inspect.getmodule(fp.moments))
    assert result.attempted and not result.failed
