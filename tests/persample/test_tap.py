"""How watched parameters are used: computed weights, own gradients, checkpoints."""

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments, refused
from nets import Mixing, batches, conv_net, data
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fisherprune as fp


class Standardized(nn.Linear):
    def forward(self, x):
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, weight, self.bias)


class StandardizedConv(nn.Conv1d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class DoubledBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, 2 * self.bias)


class Hypernetwork(nn.Linear):
    """The weight is what another layer makes of a code, the bias its own."""

    def __init__(self, *features):
        super().__init__(*features)
        self.weight = None
        self.code = nn.Parameter(torch.randn(1, 3))
        self.maker = nn.Linear(3, self.in_features * self.out_features, bias=False)

    def forward(self, x):
        weight = self.code @ self.maker.weight.T
        return F.linear(x, weight.view(self.out_features, -1), self.bias)


def computed(kind):
    """Wrap a layer whose weight or bias is computed; inputs [N, 4]."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), kind(6, 6), nn.Linear(6, 5))
    return model.eval()


def pruned(*features):
    layer = nn.Linear(*features)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


COMPUTED = {
    "standardized": Standardized,
    "conv": lambda *_: nn.Sequential(
        nn.Unflatten(1, (6, 1)), StandardizedConv(6, 6, 1), nn.Flatten()
    ),
    "bias": DoubledBias,
    "hypernetwork": Hypernetwork,
    "weight_norm": lambda *n: parametrizations.weight_norm(nn.Linear(*n)),
    "spectral_norm": lambda *n: parametrizations.spectral_norm(nn.Linear(*n)),
    "pruned": pruned,
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("size", [1, 5])
def test_what_weights_are_computed_from(kind, size):
    model, (x, y) = computed(COMPUTED[kind]), data((4,))
    parameters = dict(model.named_parameters())
    expected = per_sample_moments(model, x, y, parameters)
    given = batches(x, y, size)
    assert_moments(fp.gradient_moments(model, given, parameters=parameters), expected)
    for name in parameters:
        alone = {name: parameters[name]}
        found = fp.gradient_moments(model, given, parameters=alone)
        assert_moments(found, {name: expected[name]})


def per_sample_moments(model, x, y, parameters):
    """As ``truth.moments``, in float32: models under hooks can't be copied."""
    rows = [
        torch.autograd.grad(
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]),
            list(parameters.values()),
        )
        for i in range(len(x))
    ]
    columns = (torch.stack(column).double() for column in zip(*rows, strict=True))
    named = zip(parameters, columns, strict=True)
    return {name: (g.mean(0), g.square().mean(0)) for name, g in named}


class Recomputing(nn.Module):
    """A block of square layers under a checkpoint; inputs [N, 8]."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_are_refused(reentrant):
    # As many samples as features: what is saved untapped is of the same shapes.
    x, y = data((8,), samples=8)
    match = "activation checkpointing runs layers again .* must be switched off for sco"
    unseen = "is one. uses 'block.0.* inputs: switch checkpointing off for scoring"
    refused(Recomputing(reentrant), x, y, unseen if reentrant else match)
    with torch.autograd.graph.save_on_cpu():
        refused(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)), x, y, match)


def test_other_errors_of_a_forward_pass_and_a_backward_pass_are_shown():
    def fail(_, h):
        raise RuntimeError("out of paper")

    class Failing(torch.autograd.Function):
        forward = staticmethod(lambda ctx, h: h.clone())
        backward = staticmethod(fail)

    x, y = data((4,))
    with pytest.raises(fp.FisherpruneError, match="on batch 0 .inputs .*: out of pap"):
        fp.gradient_moments(Mixing(fail), [(x, y)])
    with pytest.raises(fp.FisherpruneError, match="backward pass failed: out of pap"):
        fp.gradient_moments(Mixing(lambda _, h: Failing.apply(h)), [(x, y)])

    def sort(_, h):
        order = h[:, 0].argsort()
        return Failing.apply(h)[order][order.argsort()]

    model = Mixing(sort)
    parameters = dict(model.named_parameters())
    refused(model, x, y, "backward pass failed: out of pap", parameters=parameters)


class Adversarial(nn.Module):
    """Moves its inputs along a gradient taken in the forward pass; inputs [N, 4]."""

    def __init__(self, create_graph=False):
        super().__init__()
        self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head, self.create_graph = nn.Linear(4, 5), create_graph

    def net(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.again(self.first(x))))))

    def forward(self, x):
        x = x.detach().requires_grad_()
        total = self.net(x).square().sum()
        (grad,) = torch.autograd.grad(total, x, create_graph=self.create_graph)
        return self.net(x.detach() + grad)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_that_the_model_takes_itself(create_graph):
    model, (x, y) = Adversarial(create_graph), data((4,))
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters, 3)
    options = {"parameters": parameters, "group_size": 3}
    with pytest.warns(fp.FisherpruneWarning, match="takes gradients of it by itself"):
        found = fp.gradient_moments(model, batches(x, y, 5), **options)
    assert_moments(found, expected)


def test_gradients_of_unwatched_layers_may_be_taken():
    class Features(Mixing):
        def __init__(self):
            super().__init__(None)
            self.energy = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

        def forward(self, x):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.energy(x).sum(), x)
            return self.head(torch.tanh(self.fc(x + grad)))

    model, (x, y) = Features(), data((4,))
    parameters = {"fc.weight": model.fc.weight, "head.bias": model.head.bias}
    found = fp.gradient_moments(model, [(x, y)], parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_that_nobody_watches_keeps_no_input(affine):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine)
            self.head = nn.Linear(4, 5)
            self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2)

        def forward(self, x):
            h = self.norm(self.conv(x))
            self.node = h.grad_fn
            return self.head(torch.relu(h).mean((2, 3)))

    model, (x, y) = Normed().eval(), data((3, 6, 6))
    parameters = {"conv.weight": model.conv.weight, "conv.bias": model.conv.bias}
    expected = truth.moments(model, x, y, parameters)
    shapes = []

    def loss(outputs, labels):  # after the forward pass, before the backward pass
        kept = getattr(model.node, "saved_tensors", ())
        shapes.extend(t.shape for t in kept if t is not None)
        return F.cross_entropy(outputs, labels)

    found = fp.gradient_moments(model, [(x, y)], loss, parameters=parameters)
    assert_moments(found, expected)
    assert set(shapes) == ({(4,)} if affine else set())


def test_a_parameter_below_layers_that_nobody_watches():
    model, (x, y) = conv_net(), data((3, 9, 9))
    parameters = {"0.bias": model[0].bias}
    found = fp.gradient_moments(model, batches(x, y, 5), parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))


def test_what_a_batch_norms_weight_is_computed_from():
    class Gated(nn.BatchNorm1d):
        def forward(self, x):
            weight, bias = self.weight.exp(), self.bias
            stats = self.running_mean, self.running_var
            return F.batch_norm(x, *stats, weight, bias, False, 0.0, self.eps)

    model, (x, y) = Mixing(lambda m, h: m.norm(h)), data((4,))
    model.norm = Gated(4)
    parameters = dict(model.named_parameters())
    found = fp.gradient_moments(model.eval(), [(x, y)], parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))


def test_a_model_may_differentiate_twice_through_a_batch_norm():
    class Guided(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 5)
            self.energy = nn.Sequential(nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))

        def forward(self, x):
            h = torch.tanh(self.fc(x))
            total = self.energy(h).square().sum()
            (grad,) = torch.autograd.grad(total, h, create_graph=True)
            return self.head(h + grad)

    model, (x, y) = Guided().eval(), data((4,))
    parameters = {"fc.weight": model.fc.weight}
    found = fp.gradient_moments(model, [(x, y)], parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))


def add_(h):
    h += 1
    return h


@pytest.mark.parametrize("change", [torch.relu_, add_])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_may_be_changed_in_place(change, bias):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 2, bias=bias)
            self.fc, self.head = nn.Linear(4, 6, bias=bias), nn.Linear(6, 5)

        def forward(self, x):
            x = change(self.conv(x)).mT
            return self.head(change(self.fc(x)).mean(1))

    model, (x, y) = Changing(), data((3, 7))
    parameters = dict(model.named_parameters())
    found = fp.gradient_moments(model, [(x, y)], parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))


class Embedded(nn.Module):
    """A block between an embedding that is not scored and a head; inputs [N, T]."""

    def __init__(self, run):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.block = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 5)
        self.run = run

    def forward(self, x):
        return self.head(self.run(self.block, self.embed(x)).mean(1))


class Reversible(torch.autograd.Function):
    """Runs a block anew in its backward pass, as memory-saving networks do."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.save_for_backward(x)
        ctx.block = block
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.block(x), grad)
        return x.grad, None


@pytest.mark.parametrize(
    "run",
    [
        lambda block, x: checkpoint(block, x, use_reentrant=True),
        lambda block, x: Reversible.apply(x, block),
    ],
    ids=["checkpoint", "reversible"],
)
@pytest.mark.parametrize("compute", [fp.gradient_moments, fp.gauss_newton_diagonal])
def test_blocks_that_run_again_behind_unwatched_layers_are_refused(run, compute):
    model = Embedded(run)
    x, y = torch.randint(9, (6, 4)), torch.randint(5, (6,))
    with pytest.raises(fp.FisherpruneError, match="one. uses 'block.2.weight', which"):
        compute(model, [(x, y)])
    assert all(p.grad is None for p in model.parameters())


def test_a_branch_without_gradients_is_none_of_that():
    """Of a target that is not trained, as in self-distillation."""

    def run(block, x):
        with torch.no_grad():
            target = block(x.flip(1))
        return block(x) - target

    model, x, y = Embedded(run), torch.randint(9, (6, 4)), torch.randint(5, (6,))
    parameters = {"w": model.block[0].weight}
    found = fp.gradient_moments(model, [(x, y)], parameters=parameters)
    rows = []
    for i in range(6):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append(model.block[0].weight.grad.double())
    truth_ = torch.stack(rows).square().mean(0)
    assert truth.relative_error(found.fisher["w"], truth_) < 1e-5


def test_a_linear_call_with_a_vector_as_its_weight():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(4)), nn.Linear(1, 5)

        def forward(self, x):
            return self.head(F.linear(x, self.w).unsqueeze(1))

    model, (x, y) = Vector(), data((4,))
    found = fp.gradient_moments(model, [(x, y)], parameters={"w": model.w})
    assert_moments(found, truth.moments(model, x, y, ["w"]))
