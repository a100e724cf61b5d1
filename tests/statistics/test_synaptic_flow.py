"""The synaptic flow: its derivatives, its range, and what it can't run on."""

import pytest
import torch
import truth
from nets import Own, conv_net
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherprune as fp


def chain(scale, depth=12, width=6):
    """Layers without biases whose weights are of about one size."""
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=scale)
    return nn.Sequential(*layers, nn.Linear(width, 3, bias=False))


def flow_scores(model, shape):
    """Return the scores in float64, of all that is pruned by default."""
    named = fp.prunable_parameters(model)
    slopes = truth.synaptic_flow(model, shape, named)
    return {n: named[n].detach().abs().double() * slopes[n] for n in named}


def some(shape, samples=2):
    return [(torch.randn(samples, *shape), torch.zeros(samples, dtype=torch.long))]


def test_two_weights_by_hand():
    """The flow of ``v (w1 x1 + w2 x2)`` is 3 (0.5 + 2): shares 1.5 and 6."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-0.5, 2.0]]))
        model[1].weight.fill_(-3.0)
    (scores,) = fp.score(model, some([2]), "synflow").values()
    assert scores.tolist() == [[1.5, 6.0]]


def test_the_flow_is_conserved():
    """Without biases every layer's scores add up to the flow."""
    model = chain(0.4)
    scores = fp.score(
        model, some([6]), "synflow", parameters=dict(model.named_parameters())
    )
    sums = torch.stack([s.sum() for s in scores.values()])
    torch.testing.assert_close(sums, sums[:1].expand_as(sums), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1.0, 1e6, 1e20])
def test_flows_that_float32_can_not_hold(scale):
    model = chain(scale)
    found, wanted = fp.score(model, some([6]), "synflow"), flow_scores(model, [6])
    assert all(s.dtype == torch.float32 and s.isfinite().all() for s in found.values())
    a, b = (
        torch.cat([s.double().flatten() for s in x.values()]) for x in (found, wanted)
    )
    torch.testing.assert_close(a / a.max(), b / b.max(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("scale", "flow"), [(1e35, "inf"), (1e-35, "0.0"), (0, "0")])
def test_flows_that_nothing_can_hold_are_refused(scale, flow):
    match = f"the flow must be above 0 and finite, got {flow}"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.score(chain(scale), some([6]), "synflow")


def test_a_refused_flow_has_its_reason():
    zero = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2, bias=False))
    nn.init.zeros_(zero[1].weight)
    normalized = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2, bias=False))
    with torch.no_grad():  # a mean below 0: the normalized values are -1, 2 times 1 ...
        normalized[1].weight.copy_(torch.tensor([[2.0, 1, 1, 1, 1, 1]] * 2))
    normalized.insert(0, nn.Linear(6, 6, bias=False))
    nn.init.eye_(normalized[0].weight).data[0, 0] = 0.5
    for model, why in (
        (zero, "got 0.0 .* all zeros: initialize it"),
        (normalized, "got -.* negative values of positive ones, as LayerNorm"),
        (chain(1e35), "weights are too large"),
    ):
        with pytest.raises(fp.FisherpruneError, match=why):
            fp.score(model, some([6]), "synflow")


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.Softmax(1)])
def test_a_flow_that_falls_with_weights_is_told(norm):
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.arange(36.0).view(6, 6))  # a flow above 0
        model[2].bias.fill_(1000.0)
    wanted = flow_scores(model, [6])
    assert min(s.min() for s in wanted.values()) < 0
    with pytest.warns(fp.FisherpruneWarning, match="falls where some weights grow"):
        found = fp.score(model, some([6]), "synflow")
    assert all(truth.relative_error(found[n], wanted[n]) < 1e-4 for n in wanted)


class Again(torch.autograd.Function):
    """Runs a layer once more in the backward pass, as reversible blocks do."""

    @staticmethod
    def forward(ctx, x, layer, *weights):
        ctx.layer, ctx.weights = layer, weights
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            again = ctx.layer(x)
        weights = [*ctx.layer.parameters()]
        found, *slopes = torch.autograd.grad(again, [x, *weights], grad)
        return found, None, *slopes


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: checkpoint(m, x, use_reentrant=False),
        lambda m, x: Again.apply(x, m, *m.parameters()),
    ],
)
def test_what_runs_again_in_the_backward_pass_has_the_same_weights(run):
    plain = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4, False), nn.Linear(4, 2))
    again = Own(lambda m, x: m.layers[2](run(m.layers[1], m.layers[0](x))))
    again.layers = plain
    wanted = fp.score(plain, some([6]), "synflow")
    found = fp.score(
        again, some([6]), "synflow", parameters=fp.prunable_parameters(plain)
    )
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_pixels_labels_and_batches_do_not_matter():
    model = conv_net()
    one = fp.score(model, some([3, 9, 9]), "synflow")
    two = fp.score(model, some([3, 9, 9], 5) * 3, "synflow")
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_is_left_as_found(frozen):
    model = conv_net().train()
    named = fp.prunable_parameters(model)
    wanted = flow_scores(model, [3, 9, 9])
    model.requires_grad_(not frozen)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = fp.score(model, some([3, 9, 9]), "synflow", parameters=named)
    assert all(truth.relative_error(found[n], wanted[n]) < 1e-5 for n in wanted)
    after = model.state_dict()
    assert all(torch.equal(after[n], tensor) for n, tensor in before.items())
    assert model.training and all(
        p.requires_grad is not frozen and p.grad is None for p in model.parameters()
    )


def test_half_precision_and_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    wanted = flow_scores(model, [4])
    found = fp.score(model, some([4]), "synflow")
    assert truth.relative_error(found["0.weight"], wanted["0.weight"]) < 1e-5
    half = model.to(torch.bfloat16)
    wanted = flow_scores(half, [4])
    batch = [(some([4])[0][0].bfloat16(), torch.zeros(2, dtype=torch.long))]
    found = fp.score(half, batch, "synflow")
    assert truth.relative_error(found["0.weight"], wanted["0.weight"]) < 1e-5


def test_what_has_no_input_of_ones():
    table = Own(
        lambda m, x: m.head(m.table(x).mean(1)),
        table=nn.Embedding(5, 4),
        head=nn.Linear(4, 2),
    )
    batch = (torch.randint(5, (3, 2)), torch.zeros(3, dtype=torch.long))
    with pytest.raises(fp.FisherpruneError, match="floating-point numbers, got int64"):
        fp.score(table, [batch], "synflow", parameters={"w": table.head.weight})
    with pytest.raises(fp.FisherpruneError, match="and losses left out"):
        options = {"losses": fp.losses.classification}
        fp.score(conv_net(), some([3, 9, 9]), "synflow", **options)
    several = Own(lambda m, x: (m.fc(x), x), fc=nn.Linear(4, 2), head=nn.Linear(2, 2))
    with pytest.raises(fp.FisherpruneError, match="a tensor that depends .* got tuple"):
        fp.score(several, some([4]), "synflow")
    with pytest.raises(fp.FisherpruneError, match="batches must hold samples"):
        fp.score(conv_net(), [], "synflow")
    with pytest.raises(fp.FisherpruneError, match="the model failed on batch 0"):
        fp.score(conv_net(), some([4, 9, 9]), "synflow")
