"""Parameters in calls of any function: against a loop over single samples."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import truth
from any_calls import WAYS
from checks import assert_moments, refused
from layer_calls import TOKENS, drawn, looked_up, read
from nets import Own, batches, data
from torch import nn

import fisherprune as fp
from fisherprune.persample.contributions import SMALL, Rows


def moments_of(model, x, y, size, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.FisherpruneWarning)
        return fp.gradient_moments(model, batches(x, y, size), **options)


@pytest.mark.parametrize("group_size, size", [(1, 5), (3, 4), (2, 1)])
@pytest.mark.parametrize("what", WAYS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_moments(what, group_size, size):
    make, ways = WAYS[what]
    model, (x, y) = make().eval(), data(TOKENS)
    named = dict(model.named_parameters())
    options = {"group_size": group_size, "parameters": named}
    expected = truth.moments(model, x, y, named, group_size)
    found = moments_of(model, x, y, size, **options)
    known = {n: e for n, e in expected.items() if float(e[1].norm()) > 1e-14}
    assert len(known) >= len(expected) - 1  # the bias of keys has no gradient
    assert_moments(found, known)
    if size == 5:
        assert {n: set(found.paths[n]) for n in ways} == {
            n: set(way) for n, way in ways.items()
        }


@pytest.mark.parametrize("what", ["class token, expanded", "attention", "weight norm"])
def test_the_gauss_newton_diagonal(what):
    model, (x, y) = WAYS[what][0]().eval(), data(TOKENS)
    named = dict(model.named_parameters())
    found = fp.gauss_newton_diagonal(model, batches(x, y, 5), parameters=named)
    for name, wanted in truth.gauss_newton_diagonal(model, x, named).items():
        if float(wanted.norm()) > 1e-14:
            assert truth.relative_error(found[name], wanted) < 1e-4, name


def test_the_gauss_newton_diagonal_of_samples_that_run_alone():
    model, (x, y) = WAYS["a transform of torch.func"][0](), data(TOKENS)
    named = dict(model.named_parameters())
    with pytest.warns(fp.FisherpruneWarning, match="'fc.bias' .linear: "):
        found = fp.gauss_newton_diagonal(model, batches(x, y, 5), parameters=named)
    for name, wanted in truth.gauss_newton_diagonal(model, x, named).items():
        assert truth.relative_error(found[name], wanted) < 1e-4, name


def test_what_is_seen_late_runs_alone_from_then_on():
    def forward(m, x):
        rows = lambda r: m.fc(r).tanh()  # noqa: E731
        h = rows(x) if len(x) > 3 else torch.func.vmap(rows)(x)
        return h.mean(1)

    model, (x, y) = read(forward, fc=nn.Linear(8, 8)), data(TOKENS)
    named = dict(model.named_parameters())
    expected = truth.moments(model, x, y, named, 4)
    given = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]
    with pytest.warns(fp.FisherpruneWarning, match="'fc.bias' .linear"):
        found = fp.gradient_moments(model, given, group_size=4, parameters=named)
    assert_moments(found, expected)
    assert found.paths["fc.weight"] == ("loop",)


def test_sequences_of_several_lengths():
    model = read(
        lambda m, x: m.fc(x.transpose(0, 1)).tanh().mean(0), fc=nn.Linear(8, 8)
    )
    named = dict(model.named_parameters())
    given = [
        (torch.randn(n, t, 8), torch.randint(5, (n,)))
        for n, t in ((4, 7), (1, 5), (3, 9), (5, 7), (2, 2))
    ]
    expected = truth.moments_of_batches(model, given, [*named], 3)
    found = fp.gradient_moments(model, given, group_size=3, parameters=named)
    assert_moments(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_dtype(dtype):
    parts = {"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "scale": drawn(8)}
    model = read(lambda m, x: m.scale * m.norm(m.fc(x)).tanh().mean(1), **parts)
    model, (x, y) = model.to(dtype), data(TOKENS)
    named, x = dict(model.named_parameters()), x.to(dtype)
    found = fp.gradient_moments(model, batches(x, y, 5), parameters=named)
    assert all(t.dtype == torch.float32 for t in found.fisher.values())
    expected = truth.moments(model, x, y, named)
    assert_moments(found, expected, 1e-5 if dtype == torch.float64 else 5e-2)
    masks = fp.prune(model, [(x, y)], "fts", 0.5, parameters=named, ties="position")
    for name, mask in masks.items():
        assert torch.equal(named[name] != 0, mask & (named[name] != 0))


def test_models_of_several_dtypes():
    model = read(
        lambda m, x: m.fc(x.bfloat16()).float().tanh().mean(1), fc=nn.Linear(8, 8)
    )
    model.fc.bfloat16()
    (x, y), named = data(TOKENS), dict(model.named_parameters())
    found = fp.gradient_moments(model, [(x, y)], parameters=named)
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.autograd.grad(loss, list(named.values())))
    for name, column in zip(named, zip(*rows, strict=True), strict=True):
        expected = torch.stack(column).double().square().mean(0)
        assert truth.relative_error(found.fisher[name], expected) < 3e-2, name


def test_autocast():
    model, (x, y) = WAYS["class token, repeated"][0](), data(TOKENS)
    named = dict(model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = fp.gradient_moments(model, batches(x, y, 5), parameters=named)
    assert_moments(found, truth.moments(model, x, y, named), 5e-2)


def test_what_is_computed_in_place_from_a_parameter_after_its_use():
    def forward(m, x):
        scale = m.scale * 2
        h = x * scale
        scale.add_(1)
        return (h + scale).mean(1)

    model, (x, y) = read(forward, scale=drawn(8)), data(TOKENS)
    named = dict(model.named_parameters())
    with pytest.warns(fp.FisherpruneWarning, match="'scale' .what is computed from it"):
        found = fp.gradient_moments(model, [(x, y)], parameters=named)
    assert_moments(found, truth.moments(model, x, y, named))


def test_an_embedding_whose_gradient_is_scaled_by_frequency():
    model = looked_up(
        lambda m, x: m.table(x).tanh().mean(1),
        table=nn.Embedding(11, 8, scale_grad_by_freq=True),
    )
    (x, y), weight = data(TOKENS), model.table.weight
    pairs = zip(x.split(1), y.split(1), strict=True)
    losses = [F.cross_entropy(model(one), label) for one, label in pairs]
    rows = torch.stack(
        [torch.autograd.grad(loss, weight)[0].double() for loss in losses]
    )
    found = fp.gradient_moments(model, batches(x, y, 5), parameters={"w": weight})
    assert_moments(found, {"w": (rows.mean(0), rows.square().mean(0))})


def test_samples_that_all_are_reduced_to():
    model = read(lambda m, x: (x * (m.scale * x.mean())).mean(1), scale=drawn(8))
    x, y = data(TOKENS)
    refused(model, x, y, "samples mix", parameters={"scale": model.scale})


def test_samples_that_are_taken_one_by_one():
    model = read(lambda m, x: torch.stack([m.fc(row).tanh() for row in x[:, 0]]))
    model.fc, (x, y) = nn.Linear(8, 8), data(TOKENS)
    named = dict(model.named_parameters())
    with pytest.warns(fp.FisherpruneWarning, match="reads has no axis of the samples"):
        found = fp.gradient_moments(model, [(x, y)], parameters=named)
    assert_moments(found, truth.moments(model, x, y, named))


@pytest.mark.parametrize("what", ["rows split by counts", "rows of samples in uneven"])
def test_uneven_rows_whose_total_is_even(what):
    """Of three samples: then rows look as if each sample had as many as the last."""
    (make, _), even = next(w for name, w in WAYS.items() if what in name), 0
    while even < 4:
        model, (x, y) = make(), data(TOKENS, samples=3)
        first = (x[..., 0] > 0).sum(1)
        if first.sum() != 3 * first[2] or first[0] == first[1]:
            continue
        even += 1
        named = dict(model.named_parameters())
        found = moments_of(model, x, y, 3, parameters=named)
        assert_moments(found, truth.moments(model, x, y, named))


@pytest.mark.parametrize("group_size", [1, 3])
def test_moments_of_large_rows(group_size):
    rows = torch.randn(12, SMALL // 64 + 1, 64)
    sums = torch.randn(2, *rows.shape[1:])
    means = rows.double().unflatten(0, (-1, group_size)).mean(1)
    wanted = sums.double() + torch.stack([means.sum(0), means.square().sum(0)])
    every_second = torch.stack([rows, rows], 3)[..., 0]
    samples_last = rows.movedim(0, 2).contiguous().movedim(2, 0)
    for laid in (rows, rows.mT.contiguous().mT, every_second, samples_last):
        found = sums.clone()
        Rows(laid).add_moments(*found, group_size)
        assert truth.relative_error(found, wanted) < 1e-6


def filtered(m, x, kernel):
    """Convolve sequences with a filter, as a product of spectra."""
    spectrum = torch.fft.rfft(m.fc(x), n=14, dim=1) * kernel(m)
    return torch.fft.irfft(spectrum, n=14, dim=1)[:, :7].tanh().mean(1)


def mixed(m, x):
    spectrum = torch.fft.rfft(x, dim=1)
    mixed = torch.einsum("nki,kio->nko", spectrum, torch.view_as_complex(m.mixing))
    return m.fc(torch.fft.irfft(mixed, n=7, dim=1)).tanh().mean(1)


def turned(m, x):
    """Turn pairs of features, by angles that are learned."""
    pairs = torch.view_as_complex(m.fc(x).unflatten(2, (4, 2)))
    angles = torch.polar(torch.ones_like(m.angles), m.angles)
    return torch.view_as_real(pairs * angles).flatten(2).tanh().mean(1)


COMPLEX = {
    "a filter's spectrum": lambda: read(
        lambda m, x: filtered(m, x, lambda m: torch.fft.rfft(m.kernel, n=14, dim=0)),
        fc=nn.Linear(8, 8),
        kernel=drawn(7, 8),
    ),
    "pairs": lambda: read(
        lambda m, x: filtered(m, x, lambda m: torch.view_as_complex(m.pairs)),
        fc=nn.Linear(8, 8),
        pairs=drawn(8, 8, 2),
    ),
    "an einsum": lambda: read(mixed, fc=nn.Linear(8, 8), mixing=drawn(4, 8, 8, 2)),
    "angles": lambda: read(turned, fc=nn.Linear(8, 8), angles=drawn(7, 4)),
    "a layer behind": lambda: read(
        lambda m, x: m.fc(torch.fft.fft(x, dim=1).conj().abs()).tanh().mean(1),
        fc=nn.Linear(8, 8),
    ),
}


@pytest.mark.parametrize("what", COMPLEX)
def test_complex_numbers(what):
    model, (x, y) = COMPLEX[what](), data(TOKENS)
    named = dict(model.named_parameters())
    found = moments_of(model, x, y, 5, parameters=named)
    assert_moments(found, truth.moments(model, x, y, named))
    assert found.paths["fc.weight"] == ("linear",)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors(layout):
    """Made within, of samples of several lengths."""
    lengths = torch.tensor([4, 2, 3, 1, 4])
    layers = nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5)
    model, (x, y) = nn.Sequential(*layers), data((4, 6), samples=5)

    def losses(model, batch):
        x, lengths, y = batch
        rows = [one[: int(n)] for one, n in zip(x, lengths, strict=True)]
        nested = torch.nested.nested_tensor(rows, layout=layout)
        h = torch.nested.to_padded_tensor(model(nested), 0.0).sum(1)
        return nn.functional.cross_entropy(h, y, reduction="none")

    def alone(model, x, y, n):
        h = model(x[:, :n]).sum(1)
        return nn.functional.cross_entropy(h, y)

    named = dict(model.named_parameters())
    with pytest.warns(fp.FisherpruneWarning, match="it reads a sparse or a nested"):
        found = fp.gradient_moments(
            model, [(x, lengths, y)], losses=losses, parameters=named
        )
    double = truth.in_double(model)
    weights = [*double.parameters()]
    rows = [
        torch.autograd.grad(
            alone(double, x[i : i + 1].double(), y[i : i + 1], n), weights
        )
        for i, n in enumerate(lengths.tolist())
    ]
    for name, *grads in zip(named, *rows, strict=True):
        wanted = torch.stack(grads).square().mean(0)
        assert truth.relative_error(found.fisher[name], wanted) < 1e-5


def test_functions_that_vmap_runs_one_by_one_are_not_warned_of():
    layers = nn.Linear(6, 4), nn.Bilinear(4, 4, 5)
    model = Own(lambda m, x: m.b(m.a(x), m.a(x).tanh()))
    model.a, model.b = layers  # Bilinear has no rule, and vmap none of its own
    x, y = data((6,))
    named = dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fp.gradient_moments(model, [(x, y)], parameters=named)
        loss = nn.functional.multi_margin_loss
        fp.gradient_moments(model, [(x, y)], loss, parameters=named)
    assert found.paths["b.weight"] == ("vmap",)
    with pytest.warns(UserWarning, match="performance drop"):  # as before
        torch.func.vmap(nn.functional.multi_margin_loss)(x, y)


def test_sparse_weights():
    """A matrix that is made of a parameter, and a constant one."""

    def forward(m, x):
        h = torch.sparse.mm(m.weight.to_sparse(), x[:, 0].T).T
        constant = torch.eye(8, dtype=x.dtype).to_sparse()
        return torch.tanh(torch.sparse.mm(constant, m.fc(h).T).T)

    model, (x, y) = read(forward, fc=nn.Linear(8, 8), weight=drawn(8, 8)), data(TOKENS)
    named = dict(model.named_parameters())
    with pytest.warns(fp.FisherpruneWarning, match="'weight' ._sparse_mm: it reads"):
        found = fp.gradient_moments(model, batches(x, y, 5), parameters=named)
    assert_moments(found, truth.moments(model, x, y, named))
    assert found.paths["fc.weight"] == ("linear",)
