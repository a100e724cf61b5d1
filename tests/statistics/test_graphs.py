"""Batches that run as one graph, with a twin of CUDA's graphs on the CPU."""

import copy
import itertools
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from any_calls import WAYS
from cpu_graph import CpuGraph
from nets import Own, SequenceNet, TwiceNet, batches, conv_net, data
from layer_calls import TOKENS
from torch import nn

import fisherprune as fp
from fisherprune import models
from fisherprune.statistics import recording

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 5


class Recorders(list):
    """Makes recorders, and keeps them."""

    kind = CpuGraph

    def __call__(self, device):
        self.append(self.kind(device))
        return self[-1]

    @property
    def replays(self):
        return sum(each.replays for each in self)


@pytest.fixture
def made(monkeypatch):
    made = Recorders()
    monkeypatch.setitem(recording.RECORDERS, "cpu", made)
    return made


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


def every(model):
    return dict(model.named_parameters())


def both(model, some, pick=every, **options):
    """Return moments with graphs and without, and what was warned of."""
    found, texts = [], []
    for graph in (True, False):
        own = copy.deepcopy(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options |= {"parameters": pick(own), "cuda_graph": graph}
            found.append(fp.gradient_moments(own, some, **options))
        ours = [w for w in caught if issubclass(w.category, fp.FisherpruneWarning)]
        texts.append([f"{each.message}" for each in ours])
    return *found, [text for text in texts[0] if text not in texts[1]]


def assert_same(found, expected):
    assert found.samples == expected.samples and found.groups == expected.groups
    assert found.paths == expected.paths and found.exponent == expected.exponent
    for name, sum in expected.sum.items():
        assert torch.equal(found.sum[name], sum), name
        assert torch.equal(found.sum_sq[name], expected.sum_sq[name]), name


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_moments_are_the_same_bits(case, group_size, made):
    model, shape = case
    x, y = data(shape, 6 * 6 + 5, CLASSES)
    options = {"group_size": group_size, "pick": fp.prunable_parameters}
    found, expected, warned = both(model, batches(x, y, 6), **options)
    assert_same(found, expected)
    assert made.replays == 5 and not warned  # one more of the third batch


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_calls_of_any_function(what, made):
    make, _ = WAYS[what]
    x, y = data(TOKENS, 22, CLASSES)
    found, expected, warned = both(make().eval(), batches(x, y, 4))
    assert_same(found, expected)
    assert made.replays == 4 or warned


@pytest.mark.parametrize(
    ("size", "group_size"), [(100, 1), (300, 1), (600, 1), (1100, 1), (1300, 2)]
)
def test_blocks_of_groups_are_emptied_where_they_were(size, group_size, made):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    x, y = data((3,), 8 * size + 14, CLASSES)
    some = batches(x, y, size)
    some.insert(5, (x[:14], y[:14]))
    found, expected, warned = both(model, some, group_size=group_size)
    assert_same(found, expected)
    assert made.replays == 7 and not warned


def test_a_group_that_is_open_keeps_batches_from_the_graph(made):
    model = nn.Linear(3, CLASSES)
    x, y = data((3,), 64, CLASSES)
    sizes = [8] * 4 + [6] + [8] * 2 + [2] + [8]
    cuts = [0, *itertools.accumulate(sizes)]
    some = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)]
    found, expected, warned = both(model, some, group_size=4)
    assert_same(found, expected)
    assert made.replays == 4 and not warned  # third twice, fourth, last


def test_groups_that_run_on_are_no_graph(made):
    x, y = data((3,), 40, CLASSES)
    found, expected, warned = both(
        nn.Linear(3, CLASSES), batches(x, y, 8), group_size=3
    )
    assert_same(found, expected)
    assert not made.replays and "groups run on from batch to batch" in warned[0]


def test_batches_of_one_sample(made):
    x, y = data((3,), 6, CLASSES)
    found, expected, warned = both(nn.Linear(3, CLASSES), batches(x, y, 1))
    assert_same(found, expected)
    assert made.replays == 5 and not warned


def test_short_passes_run_as_ever(made):
    x, y = data((3,), 16, CLASSES)
    found, expected, warned = both(nn.Linear(3, CLASSES), batches(x, y, 8))
    assert_same(found, expected)
    assert not made.replays and not warned


def test_channels_last_and_autocast(made):
    model = conv_net().eval().to(memory_format=torch.channels_last)
    x, y = data((3, 9, 9), 25, CLASSES)
    some = batches(x.to(memory_format=torch.channels_last), y, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected, warned = both(model, some)
    assert_same(found, expected)
    assert made.replays == 4 and not warned


def test_batches_of_another_layout_run_as_ever(made):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, CLASSES))
    x, y = data((3, 5, 5), 35, CLASSES)
    some = batches(x, y, 5)
    x, y = some[4]
    some[4] = x.to(memory_format=torch.channels_last), y
    found, expected, warned = both(model, some)
    assert_same(found, expected)
    assert made.replays == 5 and not warned


def test_every_score_of_a_pass(made):
    model = conv_net().eval()
    some = batches(*data((3, 9, 9), 24, CLASSES), 6)
    codes = ["fts", "snip", "fisher_diag", "grasp", "obd"]
    expected = fp.score_all(model, some, codes)
    found = fp.score_all(model, some, codes, settings=fp.Settings(cuda_graph=True))
    for code, scores in expected.items():
        for name, score in scores.items():
            assert torch.equal(found[code][name], score), (code, name)
    assert made.replays == 3


def own_losses(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def dictionaries(**more):
    some = [
        {"x": torch.randn(4, 6), "y": torch.randint(CLASSES, (4,))} for _ in range(6)
    ]
    for i, batch in enumerate(some):
        batch |= {n: v(i) if callable(v) else v for n, v in more.items()}
    return some


def test_batches_of_any_structure(made):
    more = {"scale": 0.5, "name": "a", "none": None, "more": [torch.ones(())]}
    found, expected, warned = both(
        nn.Linear(6, CLASSES), dictionaries(**more), losses=own_losses
    )
    assert_same(found, expected)
    assert made.replays == 5 and not warned


@pytest.mark.parametrize("value", [lambda i: i, lambda i: object()], ids=["i", "other"])
def test_batches_with_values_that_are_not_alike(value, made):
    def losses(model, batch):
        scale = batch["scale"] if isinstance(batch["scale"], int) else 1
        return own_losses(model, batch) * (1 + scale)

    found, expected, warned = both(
        nn.Linear(6, CLASSES), dictionaries(scale=value), losses=losses
    )
    assert_same(found, expected)
    assert not made.replays and "no batch is like another" in warned[0]


def test_a_model_that_changes_its_input(made):
    def run(self, x):
        return self.head(F.relu(x, inplace=True) + self.shift)

    model = Own(run, head=nn.Linear(6, CLASSES), shift=nn.Parameter(torch.ones(6)))
    found, expected, warned = both(model, batches(*data((6,), 24, CLASSES), 4))
    assert_same(found, expected)
    assert made.replays == 5 and not warned


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(), lambda o, y: F.cross_entropy(o, y) ** 2]
)
def test_losses(loss_fn, made):
    some = batches(*data((6,), 24, CLASSES), 4)
    found, expected, warned = both(nn.Linear(6, CLASSES), some, loss_fn=loss_fn)
    assert_same(found, expected)
    assert made.replays == 5 and not warned


def test_passes_for_parts_of_the_parameters(made):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    limit = {"max_accumulator_bytes": 24 * 50}
    found, expected, warned = both(model, batches(*data((6,), 24, 5), 4), **limit)
    assert_same(found, expected)
    assert len(made) > 1 and made.replays == 5 * len(made) and not warned


# What can't be a graph: the pass goes on without, and says why.


class Counting(nn.Module):
    """Another function in each batch, or so it seems."""

    def __init__(self):
        super().__init__()
        self.head, self.calls = nn.Linear(6, CLASSES), 0
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scale", torch.ones(6))


class CountsCalls(Counting):
    def forward(self, x):
        self.calls += 1
        return self.head(x)


class CountsInBuffer(Counting):
    def forward(self, x):
        self.seen += 1
        return self.head(x) + 1e-6 * self.seen


class ReplacesBuffer(Counting):
    def forward(self, x):
        self.scale = self.scale.clone()
        return self.head(x * self.scale)


class ReadsValues(Counting):
    def forward(self, x):
        return self.head(x) * 2 if x.isnan().any().item() else self.head(x)


class ReadsMask(Counting):
    def forward(self, x):
        x = x.clone()
        x[x > 0] *= 2
        return self.head(x)


class PicksRows(Counting):
    def forward(self, x):
        return self.head(x.index_add(1, x.new_ones(6).nonzero().flatten(), x))


class MakesTensors(Counting):
    def forward(self, x):
        return self.head(x) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


class OwnGenerator(Counting):
    def forward(self, x):
        generator = torch.Generator().manual_seed(0)
        return self.head(x + torch.rand(6, generator=generator))


class RunsAlone(Counting):
    def forward(self, x):
        return torch.cat([self.head(one) for one in x.split(1)])


UNFIT = {
    CountsCalls: "changes attributes or buffers",
    CountsInBuffer: "changes attributes or buffers",
    ReplacesBuffer: "changes attributes or buffers",
    ReadsValues: "_local_scalar_dense reads values",
    ReadsMask: "index reads values",
    PicksRows: "nonzero reads values",
    MakesTensors: "a tensor is made of numbers of Python",
    OwnGenerator: "draws from a generator of its own",
    RunsAlone: "once more for each sample alone",
}


@pytest.mark.parametrize("kind", UNFIT)
def test_models_that_are_no_graph(kind, made):
    some = batches(*data((6,), 24, CLASSES), 4)
    found, expected, warned = both(kind(), some)
    assert_same(found, expected)
    assert not made.replays
    (text,) = warned
    assert "batches ran without a graph, as ever" in text and UNFIT[kind] in text


def test_scored_embeddings_read_values(made):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, CLASSES))
    x, y = torch.randint(7, (24, 3)), torch.randint(CLASSES, (24,))
    found, expected, warned = both(model, batches(x, y, 4))
    assert_same(found, expected)
    assert not made.replays and "reads" in warned[0]


def test_losses_times_a_power_of_two_read_values(made):
    some = batches(*data((6,), 24, CLASSES), 4)
    found, expected, warned = both(
        nn.Linear(6, CLASSES), some, loss_fn=lambda o, y: F.cross_entropy(o, y) * 1e-25
    )
    assert_same(found, expected)
    assert found.exponent and made.replays == 5  # of the first pass
    assert "_local_scalar_dense reads values" in warned[0]


def test_what_python_does_otherwise_in_the_third_batch_is_seen(made):
    """It decides by what is no attribute of a module."""
    factor = [1]
    x, y = data((6,), 24, CLASSES)

    class Growing:
        def __iter__(self):
            for factor[0], batch in enumerate(batches(x, y, 4)):
                factor[0] = max(factor[0], 1)
                yield batch

    model = Own(lambda m, x: m.head(x) * factor[0], head=nn.Linear(6, CLASSES))
    found, expected, (warned,) = both(model, Growing())
    assert_same(found, expected)
    assert made.replays == 1 and "finds other sums of another batch" in warned


def test_a_model_that_changes_between_batches(made):
    """Its weights, which a graph would read; but what is computed from them is kept."""
    x, y = data((3, 5, 5), 36, CLASSES)

    def changing(model):
        for i, batch in enumerate(batches(x, y, 6)):
            if i == 4:
                with torch.no_grad():
                    model[1].running_var.mul_(4)
            yield batch

    make = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, CLASSES)
    model = nn.Sequential(*make).eval()
    other = copy.deepcopy(model)
    expected = fp.gradient_moments(other, changing(other))
    with pytest.warns(fp.FisherpruneWarning, match="not what it was"):
        found = fp.gradient_moments(model, changing(model), cuda_graph=True)
    assert_same(found, expected)
    assert made.replays == 3


def test_sums_that_are_kept_elsewhere(made, tmp_path):
    some = batches(*data((6,), 24, CLASSES), 4)
    found, expected, warned = both(nn.Linear(6, CLASSES), some, offload=tmp_path)
    assert_same(found, expected)
    assert not made.replays and "sums are kept elsewhere" in warned[0]


def test_devices_without_graphs_run_as_ever():
    some = batches(*data((6,), 24, CLASSES), 4)
    found, expected, warned = both(nn.Linear(6, CLASSES), some)
    assert_same(found, expected)
    assert "the model must be on cuda, got cpu" in warned[0]


def test_sampled_labels_are_refused():
    with pytest.raises(
        fp.FisherpruneError, match="cuda_graph must be False where labels are sampled"
    ):
        fp.Settings(labels="sampled", cuda_graph=True)
    with pytest.raises(
        fp.FisherpruneError, match="cuda_graph must be True or False, got 1"
    ):
        fp.Settings(cuda_graph=1)


# What goes wrong while a graph is made.


class Fails(CpuGraph):
    @contextmanager
    def recording(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        yield


class Waits(CpuGraph):
    @contextmanager
    def warming_up(self):
        yield
        raise recording.UnfitError("a function waits for the device")


class FailsInside(CpuGraph):
    @contextmanager
    def recording(self):
        with super().recording():
            yield
        raise RuntimeError("operation failed due to a previous error during capture")


class Forgets(CpuGraph):
    def replay(self):
        self.calls, every = self.calls[:-1], self.calls
        super().replay()
        self.calls = every


class Overflows(CpuGraph):
    def replay(self):
        super().replay()
        raise torch.OutOfMemoryError("CUDA out of memory")


TROUBLE = {
    Fails: "OutOfMemoryError|out of memory",
    Waits: "waits for the device",
    FailsInside: "previous error during capture",
    Forgets: "finds other sums of another batch",
    Overflows: "out of memory",
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_with_a_graph_changes_nothing(kind, made):
    made.kind = kind
    some = batches(*data((3, 9, 9), 24, CLASSES), 4)
    found, expected, (warned,) = both(conv_net().eval(), some)
    assert_same(found, expected)
    assert any(text in warned for text in TROUBLE[kind].split("|"))


# Errors in a batch that runs as a graph.


def test_labels_that_are_no_classes(made):
    some = batches(*data((6,), 28, CLASSES), 4)
    some[4][1][2] = CLASSES + 2
    message = rf"labels must lie in \[0, {CLASSES}\), .* to {CLASSES + 2}"
    model = nn.Linear(6, CLASSES)
    with pytest.raises(fp.FisherpruneError, match=message):
        fp.gradient_moments(model, some, cuda_graph=True, parameters=every(model))
    assert made.replays


@pytest.mark.parametrize("number", [2, 4, 6])
def test_a_loss_that_is_not_finite(number, made):
    some = batches(*data((6,), 28, CLASSES), 4)
    some[number][0][1] = torch.inf
    model, message = nn.Linear(6, CLASSES), r"finite, got (nan|-?inf) for sample 1"
    with pytest.raises(fp.FisherpruneError, match=message):
        fp.gradient_moments(model, some, cuda_graph=True, parameters=every(model))


def test_a_model_is_left_as_it_was_found(made):
    model = conv_net().train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    some = batches(*data((3, 9, 9), 24, CLASSES), 4)
    random = torch.get_rng_state()

    def failing():
        yield from some
        raise KeyError("end")

    for source in (some, failing()):
        try:
            fp.gradient_moments(model, source, cuda_graph=True)
        except KeyError:
            pass
        assert all(module.training for module in model.modules())
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), random)
    assert made.replays == 10
    copy.deepcopy(model)
