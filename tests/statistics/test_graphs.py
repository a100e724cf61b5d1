"""Batches that run as one graph have the sums that they have without.

The CPU has a twin of CUDA's graphs.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from any_calls import WAYS
from graph_checks import assert_same, both
from layer_calls import TOKENS
from nets import Own, SequenceNet, TwiceNet, batches, conv_net, data
from torch import nn

import fisherprune as fp
from fisherprune import models

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 5


class Attention(nn.Module):
    """A transformer's layer over images' rows; inputs [N, 6, 8]."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, F.gelu, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.places = nn.Embedding(6, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.layers(x + places).mean(1))


NETS = {
    "convolutions": (conv_net, (3, 9, 9)),
    "resnet": (models.resnet20, (3, 8, 8)),
    "sequences": (SequenceNet, (4, 12)),
    "weights used twice": (TwiceNet, (4, 8, 8)),
    "attention": (Attention, (6, 8)),
}


@pytest.fixture(params=NETS)
def case(request):
    make, shape = NETS[request.param]
    return make().eval(), shape


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_moments_are_the_same_bits(case, group_size, cpu_graphs):
    model, shape = case
    x, y = data(shape, 6 * 6 + 5, CLASSES)
    options = {"group_size": group_size, "pick": fp.prunable_parameters}
    found, expected, warned = both(model, batches(x, y, 6), **options)
    assert_same(found, expected)
    assert cpu_graphs.replays == 5 and not warned  # one more of the third batch


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_calls_of_any_function(what, cpu_graphs):
    make, _ = WAYS[what]
    x, y = data(TOKENS, 22, CLASSES)
    found, expected, warned = both(make().eval(), batches(x, y, 4))
    assert_same(found, expected)
    assert cpu_graphs.replays == 4 or warned


@pytest.mark.parametrize(
    ("size", "group_size"), [(100, 1), (300, 1), (600, 1), (1100, 1), (1300, 2)]
)
def test_blocks_of_groups_are_emptied_where_they_were(size, group_size, cpu_graphs):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    x, y = data((3,), 8 * size + 14, CLASSES)
    some = batches(x, y, size)
    some.insert(5, (x[:14], y[:14]))
    found, expected, warned = both(model, some, group_size=group_size)
    assert_same(found, expected)
    assert cpu_graphs.replays == 7 and not warned


def test_a_group_that_is_open_keeps_batches_from_the_graph(cpu_graphs):
    model = nn.Linear(3, CLASSES)
    x, y = data((3,), 64, CLASSES)
    sizes = [8] * 4 + [6] + [8] * 2 + [2] + [8]
    cuts = [0, *itertools.accumulate(sizes)]
    some = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)]
    found, expected, warned = both(model, some, group_size=4)
    assert_same(found, expected)
    assert cpu_graphs.replays == 4 and not warned  # third twice, fourth, last


def test_groups_that_run_on_are_no_graph(cpu_graphs):
    x, y = data((3,), 40, CLASSES)
    found, expected, warned = both(
        nn.Linear(3, CLASSES), batches(x, y, 8), group_size=3
    )
    assert_same(found, expected)
    assert not cpu_graphs.replays and "groups run on from batch to batch" in warned[0]


def test_batches_of_one_sample(cpu_graphs):
    x, y = data((3,), 6, CLASSES)
    found, expected, warned = both(nn.Linear(3, CLASSES), batches(x, y, 1))
    assert_same(found, expected)
    assert cpu_graphs.replays == 5 and not warned


def test_short_passes_run_as_ever(cpu_graphs):
    x, y = data((3,), 16, CLASSES)
    found, expected, warned = both(nn.Linear(3, CLASSES), batches(x, y, 8))
    assert_same(found, expected)
    assert not cpu_graphs.replays and not warned


def test_channels_last_and_autocast(cpu_graphs):
    model = conv_net().eval().to(memory_format=torch.channels_last)
    x, y = data((3, 9, 9), 25, CLASSES)
    some = batches(x.to(memory_format=torch.channels_last), y, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected, warned = both(model, some)
    assert_same(found, expected)
    assert cpu_graphs.replays == 4 and not warned


def test_batches_of_another_layout_run_as_ever(cpu_graphs):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, CLASSES))
    x, y = data((3, 5, 5), 35, CLASSES)
    some = batches(x, y, 5)
    x, y = some[4]
    some[4] = x.to(memory_format=torch.channels_last), y
    found, expected, warned = both(model, some)
    assert_same(found, expected)
    assert cpu_graphs.replays == 5 and not warned


def test_every_score_of_a_pass(cpu_graphs):
    model = conv_net().eval()
    some = batches(*data((3, 9, 9), 24, CLASSES), 6)
    codes = ["fts", "snip", "fisher_diag", "grasp", "obd"]
    expected = fp.score_all(model, some, codes)
    found = fp.score_all(model, some, codes, settings=fp.Settings(cuda_graph=True))
    for code, scores in expected.items():
        for name, score in scores.items():
            assert torch.equal(found[code][name], score), (code, name)
    assert cpu_graphs.replays == 3


def own_losses(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def dictionaries(**more):
    some = [
        {"x": torch.randn(4, 6), "y": torch.randint(CLASSES, (4,))} for _ in range(6)
    ]
    for i, batch in enumerate(some):
        batch |= {n: v(i) if callable(v) else v for n, v in more.items()}
    return some


def test_batches_of_any_structure(cpu_graphs):
    more = {"scale": 0.5, "name": "a", "none": None, "more": [torch.ones(())]}
    found, expected, warned = both(
        nn.Linear(6, CLASSES), dictionaries(**more), losses=own_losses
    )
    assert_same(found, expected)
    assert cpu_graphs.replays == 5 and not warned


@pytest.mark.parametrize("value", [lambda i: i, lambda i: object()], ids=["i", "other"])
def test_batches_with_values_that_are_not_alike(value, cpu_graphs):
    def losses(model, batch):
        scale = batch["scale"] if isinstance(batch["scale"], int) else 1
        return own_losses(model, batch) * (1 + scale)

    found, expected, warned = both(
        nn.Linear(6, CLASSES), dictionaries(scale=value), losses=losses
    )
    assert_same(found, expected)
    assert not cpu_graphs.replays and "no batch is like another" in warned[0]


def test_a_model_that_changes_its_input(cpu_graphs):
    def run(self, x):
        return self.head(F.relu(x, inplace=True) + self.shift)

    model = Own(run, head=nn.Linear(6, CLASSES), shift=nn.Parameter(torch.ones(6)))
    found, expected, warned = both(model, batches(*data((6,), 24, CLASSES), 4))
    assert_same(found, expected)
    assert cpu_graphs.replays == 5 and not warned


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(), lambda o, y: F.cross_entropy(o, y) ** 2]
)
def test_losses(loss_fn, cpu_graphs):
    some = batches(*data((6,), 24, CLASSES), 4)
    found, expected, warned = both(nn.Linear(6, CLASSES), some, loss_fn=loss_fn)
    assert_same(found, expected)
    assert cpu_graphs.replays == 5 and not warned


def test_passes_for_parts_of_the_parameters(cpu_graphs):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    limit = {"max_accumulator_bytes": 24 * 50}
    found, expected, warned = both(model, batches(*data((6,), 24, 5), 4), **limit)
    assert_same(found, expected)
    assert (
        len(cpu_graphs) > 1 and cpu_graphs.replays == 5 * len(cpu_graphs) and not warned
    )
