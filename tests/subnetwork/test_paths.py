"""Effective masks are what a search in the explicit graph finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import randomized
from paths import Graph
from torch import nn
from torch.nn import functional as F

import fisherprune as fp

SEEDS, DENSITIES = st.integers(0, 2**32), st.sampled_from([0.03, 0.1, 0.2, 0.5, 1.0])


def random_masks(model, density, wanted=lambda name: "weight" in name):
    return fp.Masks(
        {
            name: torch.rand(p.shape) < density
            for name, p in model.named_parameters()
            if wanted(name) and p.dim() > 1
        }
    )


def weights_in(masks):
    return {
        (name, tuple(place))
        for name, mask in masks.items()
        for place in mask.nonzero().tolist()
    }


@settings(max_examples=40)
@given(SEEDS, st.lists(st.integers(1, 7), min_size=2, max_size=6), DENSITIES)
def test_linear_layers(seed, widths, density):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    model = nn.Sequential(*(x for layer in layers for x in (layer, nn.ReLU())))
    masks, graph = random_masks(model, density), Graph()
    inputs = values = graph.grid(widths[0])
    for name, mask in masks.items():
        values = graph.linear(values, name, mask)
    found = fp.effective_masks(model, torch.zeros(1, widths[0]), masks)
    assert weights_in(found) == graph.on_paths(inputs, values)


class Residual(nn.Module):
    """Convolutions with stride and groups, BatchNorm, pooling, a shortcut."""

    def __init__(self, groups, stride, pool):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, stride, 1, groups=groups, bias=False)
        self.b = nn.Conv2d(4, 4, 2 * (stride % 2) + 1, padding=stride % 2)
        self.shortcut = nn.Conv2d(4, 4, 1, stride)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.pool = pool
        self.head = nn.Linear(4, 3)
        randomized(self)

    def forward(self, x):
        x = self.pool(F.relu(self.norms[0](self.stem(x)), inplace=True), 2)
        y = self.norms[2](self.b(F.relu(self.norms[1](self.a(x)))))
        x = y.add_(self.shortcut(x)).relu_()
        return self.head(x.mean((2, 3)))

    def graph(self, masks):
        net = Graph()
        x = inputs = net.grid(2, 5, 5)
        x = net.pool(net.conv(x, "stem.weight", masks["stem.weight"], padding=1), 2)
        stride, groups = self.a.stride[0], self.a.groups
        y = net.conv(x, "a.weight", masks["a.weight"], stride, 1, groups)
        y = net.conv(y, "b.weight", masks["b.weight"], 1, self.b.padding[0])
        cut = net.conv(x, "shortcut.weight", masks["shortcut.weight"], stride)
        y = net.join(net.grid(4, *y.keys() and _size(y)), y, cut)
        flat = net.linear(
            net.flat(net.pool(y, _size(y)[0])), "head.weight", masks["head.weight"]
        )
        return net.on_paths(inputs, flat)


def _size(grid):
    _, height, width = map(max, zip(*grid, strict=True))
    return height + 1, width + 1


@settings(max_examples=40)
@given(
    SEEDS,
    DENSITIES,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([F.max_pool2d, F.avg_pool2d]),
)
def test_convolutions_with_a_shortcut(seed, density, groups, stride, pool):
    torch.manual_seed(seed)
    model = Residual(groups, stride, pool)
    masks = random_masks(model, density)
    found = fp.effective_masks(model, torch.randn(1, 2, 5, 5), masks)
    assert weights_in(found) == model.graph(masks)


def test_a_tap_that_sees_the_border_alone_does_nothing():
    model = nn.Conv2d(1, 1, 3, padding=1)  # of an image of one pixel
    masks = {"weight": torch.ones(1, 1, 3, 3) > 0}
    found = fp.effective_masks(model, torch.ones(1, 1, 1, 1), masks)
    assert weights_in(found) == {("weight", (0, 0, 1, 1))}
    assert fp.effective_masks(model, torch.ones(1, 1, 3, 3), masks) == masks


def test_a_bias_begins_no_path_and_counts_where_its_unit_leads_on():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    masks = {
        "0.weight": torch.tensor([[True, True], [False, False]]),
        "0.bias": torch.tensor([True, True]),
        "2.weight": torch.tensor([[False, True]]),
        "2.bias": torch.tensor([True]),
    }
    found = fp.effective_masks(model, torch.ones(1, 2), masks)
    assert weights_in(found) == {("0.bias", (1,)), ("2.bias", (0,))}


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU6(), nn.ReLU(True), nn.LeakyReLU(), nn.ELU(), nn.CELU()),
    *(nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Sigmoid()),
    *(nn.Softplus(), nn.Softsign(), nn.Hardswish(), nn.Hardsigmoid(), nn.PReLU()),
    *(nn.Hardtanh(-0.01, 0.01), nn.Hardtanh(0.1, 0.2, inplace=True)),
    *(nn.Threshold(100, 0), nn.Softshrink(50), nn.Hardshrink(60), nn.Tanhshrink()),
    *(nn.LogSigmoid(), nn.RReLU(), nn.Dropout(0.5), nn.Softmax(1), nn.LogSoftmax(1)),
    *(nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6), nn.BatchNorm1d(6)),
    *(nn.Identity(), nn.GLU(), nn.Softmin(1), nn.Flatten(), nn.AlphaDropout(0.5)),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_no_activation_blocks_a_path(activation):
    model = nn.Sequential(nn.Linear(4, 6), activation, nn.LazyLinear(3))
    model(torch.randn(2, 4))
    masks = random_masks(model, 1.0)
    assert fp.effective_masks(model, torch.zeros(1, 4), masks) == masks


class Extremes(nn.Module):
    """Functions that pass on the largest or smallest of several values."""

    def __init__(self, pool, dims=2):
        super().__init__()
        conv = nn.Conv1d, nn.Conv2d, nn.Conv3d
        self.conv = conv[dims - 1](1, 4, 3, padding=1)
        self.pool, self.head = pool, nn.LazyLinear(2)

    def forward(self, x):
        return self.head(self.pool(self.conv(x)).flatten(1))


POOLS = {
    "pool1": (nn.MaxPool1d(2), 1),
    "pool2": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), 2),
    "pool3": (nn.MaxPool3d(2), 3),
    "with places": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], 2),
    "pairs": (lambda x: F.max_pool3d_with_indices(x, 2)[0], 3),
    "pairs of torch": (lambda x: torch.adaptive_max_pool1d(x, 1)[0][None], 1),
    "torch's": (lambda x: torch.max_pool2d(x, [2, 2]), 2),
    "adaptive1": (nn.AdaptiveMaxPool1d(1), 1),
    "adaptive2": (nn.AdaptiveMaxPool2d((1, 2)), 2),
    "adaptive3": (lambda x: F.adaptive_max_pool3d(x, 1, return_indices=True)[0], 3),
    "amax": (lambda x: x.amax((2, 3)), 2),
    "max": (lambda x: x.max(2).values.min(dim=2)[0], 2),
    "maximum": (lambda x: torch.maximum(x[:, :2], x[:, 2:]), 2),
    "max of two": (lambda x: torch.max(x[:, :2], other=x[:, 2:]), 2),
    "of all": (lambda x: torch.stack([x.max(), x.min()])[None], 2),
    "clamp": (lambda x: x.clamp_(min=50).clip(50, 51), 2),
    "lp": (nn.LPPool2d(2, 2), 2),
}


@pytest.mark.parametrize("name", POOLS)
def test_what_passes_on_some_values_blocks_none(name):
    pool, dims = POOLS[name]
    size = 2 + 2 * (name == "pool2")  # each value of a window has taps of its own
    model, x = Extremes(pool, dims), torch.randn(1, 1, *[size] * dims)
    model(x)
    masks = random_masks(model, 1.0)
    assert fp.effective_masks(model, x, masks) == masks
    masks["head.weight"][:] = False
    assert fp.effective_masks(model, x, masks).kept() == 0


def test_very_deep_and_thin_networks_stay_in_range():
    layers = [layer for _ in range(300) for layer in (nn.Linear(40, 40), nn.ReLU())]
    model = nn.Sequential(*layers)
    masks = random_masks(model, 1.0)
    for mask in masks.values():
        mask[1:] = torch.rand(39, 40) < 0.5
        mask[1:, 0] = False  # the first unit passes from layer to layer
        mask[0, 1:] = False
    masks["0.weight"][1:] = False
    found = fp.effective_masks(model, torch.ones(1, 40), masks)
    assert found.kept() == 300 and all(mask[0, 0] for mask in found.values())


def test_gates_and_attention():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    masks = random_masks(layer, 1.0)
    x = torch.randn(1, 3, 8)
    assert fp.effective_masks(layer, x, masks) == masks
    masks["self_attn.in_proj_weight"][16:] = False  # no values
    found = fp.effective_masks(layer, x, masks)
    lost = {name for name in masks if not found[name].any()}
    assert lost == {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}
    assert found["linear1.weight"].all() and found["linear2.weight"].all()


def test_recurrent_layers():
    layer = nn.LSTM(3, 4, 2)
    masks = random_masks(layer, 1.0)
    x = torch.randn(5, 1, 3)
    assert fp.effective_masks(layer, x, masks) == masks
    masks["weight_ih_l1"][:] = False  # nothing of the first layer gets on ...
    found = fp.effective_masks(nn.Sequential(layer, Last()), x, _under("0.", masks))
    assert not found["0.weight_ih_l0"].any() and not found["0.weight_hh_l1"].any()


class Last(nn.Module):
    def forward(self, found):
        return found[0][-1]


def _under(prefix, masks):
    return {f"{prefix}{name}": mask for name, mask in masks.items()}


def test_shared_weights_count_once_and_any_use_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.table(tokens))

    masks = {"table.weight": torch.rand(7, 3) < 0.5}
    found = fp.effective_masks(Twice(), torch.tensor([[1, 2]]), masks)
    assert found == masks


def test_rows_of_an_embedding_that_are_not_looked_up():
    model = nn.Sequential(nn.Embedding(9, 3, padding_idx=0), nn.Linear(3, 2))
    masks = random_masks(model, 1.0)
    assert fp.effective_masks(model, torch.tensor([[1, 2]]), masks) == masks


def test_synflow_never_keeps_a_weight_off_all_paths():
    """A layer's weights compete by flow: a weight without any has score 0."""
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    masks = random_masks(model, 0.3)
    once = fp.effective_masks(model, torch.ones(1, 6), masks)
    assert fp.effective_masks(model, torch.ones(1, 6), once) == once
