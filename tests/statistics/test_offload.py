"""Sums in parts of the parameters, and elsewhere than beside them: the same bits."""

import ctypes
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from nets import RowByRow, TwiceNet, batches, conv_net, data
from torch import nn
from torch.nn import functional as F

import fisherprune as fp
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.statistics.passes import checked_task
from fisherprune.statistics.run import statistics_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fisherprune.FisherpruneWarning"),
    pytest.mark.filterwarnings("ignore:Using padding:UserWarning"),
]


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, batches):
        self.batches, self.times = batches, 0

    def __iter__(self):
        self.times += 1
        return iter(self.batches)


def linear():
    """Return a small network; inputs [N, 4]."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))


def case(kind):
    """Return a model, batches, and all its parameters."""
    model, shape = {
        "convolutions": (conv_net, (3, 9, 9)),
        "used twice": (TwiceNet, (4, 8, 8)),
        "sample by sample": (RowByRow, (3, 4)),
        "linear": (linear, (4,)),
    }[kind]
    model = model()
    return model, batches(*data(shape), 4), dict(model.named_parameters())


def ways(parameters, folder, bytes_a_weight=24):
    """Return options, and for each the least number of passes, where it says one."""
    sizes = [p.numel() * bytes_a_weight for p in parameters.values()]
    limit = max(sizes)
    passes = -(-sum(sizes) // limit)
    assert passes > 1
    return [
        ({"offload": str(folder)}, 1),
        ({"max_accumulator_bytes": limit}, passes),
        ({"max_accumulator_bytes": limit, "offload": folder}, passes),
    ]


def assert_same(found, expected):
    for part in ("sum", "sum_sq", "mean", "fisher"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs), part
    for fact in ("samples", "groups", "group_size", "paths", "exponent", "labels"):
        assert getattr(found, fact) == getattr(expected, fact)


def tiny(outputs, labels):
    """Return a loss whose squared gradients float32 can't hold."""
    return 1e-25 * F.cross_entropy(outputs, labels)


@pytest.mark.parametrize(
    "kind, size, options",
    [
        ("convolutions", 24, {}),
        ("convolutions", 28, {"group_size": 3}),
        ("convolutions", 32, {"group_size": 600}),
        ("convolutions", 48, {"labels": "sampled", "draws": 2}),
        ("convolutions", 84, {"labels": "sampled", "draws": 2, "group_size": 5}),
        ("used twice", 28, {"group_size": 5}),
        ("sample by sample", 24, {}),
        ("sample by sample", 28, {"group_size": 5}),
    ],
)
def test_moments_are_the_same_bits(tmp_path, kind, size, options):
    model, data, parameters = case(kind)
    options |= {"parameters": parameters}
    expected = fp.gradient_moments(model, data, **options)
    for place, passes in ways(parameters, tmp_path, size):
        read = Counted(data)
        found = fp.gradient_moments(model, read, **options, **place)
        assert read.times == 1 if passes == 1 else passes <= read.times <= passes + 2
        assert_same(found, expected)
    assert not list(tmp_path.iterdir())  # files go with the tensors


def test_what_has_room_is_found_in_one_pass():
    model, data, parameters = case("linear")
    expected = fp.gradient_moments(model, data, parameters=parameters)
    size = 24 * sum(p.numel() for p in parameters.values())
    for place in ({"max_accumulator_bytes": size}, {"offload": "cpu"}):
        read = Counted(data)
        found = fp.gradient_moments(model, read, parameters=parameters, **place)
        assert read.times == 1
        assert_same(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("group_size", [1, 3, 600])
def test_sums_of_a_gpu_are_the_same_bits_elsewhere(tmp_path, group_size):
    model, data, _ = case("convolutions")
    parameters = dict(model.cuda().named_parameters())
    options = {"parameters": parameters, "group_size": group_size}
    expected = fp.gradient_moments(model, data, **options)
    size = max(p.numel() for p in parameters.values()) * 32
    for place in ("cpu", tmp_path):
        for limit in (None, size):
            where = {"offload": place, "max_accumulator_bytes": limit}
            found = fp.gradient_moments(model, data, **options, **where)
            for name, total in expected.sum.items():
                assert found.sum[name].device.type == "cpu"
                assert torch.equal(found.sum[name], total.cpu())
                assert torch.equal(found.sum_sq[name], expected.sum_sq[name].cpu())
    scores = fp.score(model, data, settings=fp.Settings(offload="cpu"))
    for name, score in fp.score(model, data).items():
        assert torch.equal(scores[name], score.cpu())


def test_sums_of_more_groups_than_a_block_holds(tmp_path):
    """These are added up in float64 tensors."""
    model, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), data((4,), 1100)
    for group_size in (1, 700):
        options = {"parameters": dict(model.named_parameters())}
        options["group_size"] = group_size
        expected = fp.gradient_moments(model, batches(x, y, 300), **options)
        places = ways(options["parameters"], tmp_path, 24 if group_size == 1 else 32)
        for place, _ in places:
            found = fp.gradient_moments(model, batches(x, y, 300), **options, **place)
            assert_same(found, expected)


def test_squares_out_of_range_lead_to_the_same_second_pass(tmp_path):
    model, data, parameters = case("linear")
    options = {"parameters": parameters, "loss_fn": tiny}
    expected = fp.gradient_moments(model, data, **options)
    scores = fp.score_all(model, data, ["fts", "snip"], **options)
    assert expected.exponent
    for place, passes in ways(parameters, tmp_path):
        read = Counted(data)
        assert_same(fp.gradient_moments(model, read, **options, **place), expected)
        assert read.times >= 2 * passes
        options["settings"] = fp.Settings(**place)
        found = fp.score_all(model, data, ["fts", "snip"], **options)
        del options["settings"]
        for code, named in scores.items():
            assert all(torch.equal(found[code][n], s) for n, s in named.items())


@pytest.mark.parametrize(
    "kind, more, codes",
    [
        ("linear", {}, ["fts", "snip", "obd", "random"]),
        ("sample by sample", {"labels": "sampled"}, ["fts", "snip"]),
    ],
)
def test_scores_and_masks_are_the_same(tmp_path, kind, more, codes):
    model, data, parameters = case(kind)
    expected = fp.score_all(
        model, data, codes, parameters=parameters, settings=fp.Settings(**more)
    )
    masks = {"rounds": 2, "ties": "position", "parameters": parameters}
    kept = fp.find_masks(model, data, settings=fp.Settings(**more), **masks)[0]
    for place, _ in ways(parameters, tmp_path, 48 if more else 24):
        settings = fp.Settings(**more, **place)
        found = fp.score_all(
            model, data, codes, parameters=parameters, settings=settings
        )
        for code, named in expected.items():
            for name, scores in named.items():
                assert torch.equal(found[code][name], scores), (code, name)
        ours = fp.find_masks(model, data, settings=settings, **masks)[0]
        assert all(torch.equal(ours[name], mask) for name, mask in kept.items())
    pruned = fp.prune(model, data, settings=settings, **masks)
    assert all(torch.equal(pruned[name], mask) for name, mask in kept.items())
    for name, mask in kept.items():
        assert not parameters[name][~mask].count_nonzero()


def test_the_gradient_alone_and_the_gauss_newton_diagonal(tmp_path):
    model, data, parameters = case("sample by sample")
    expected = fp.score(model, data, "grad_norm", group_size=3, parameters=parameters)
    diagonal = fp.gauss_newton_diagonal(model, data, parameters=parameters)
    for place, _ in ways(parameters, tmp_path, 28):
        options = {"parameters": parameters, "settings": fp.Settings(**place)}
        found = fp.score(model, data, "grad_norm", group_size=3, **options)
        assert all(torch.equal(found[name], s) for name, s in expected.items())
        ours = fp.gauss_newton_diagonal(model, data, parameters=parameters, **place)
        assert all(torch.equal(ours[name], d) for name, d in diagonal.items())


def test_cached_statistics_are_those_of_any_place(tmp_path):
    model, data, parameters = case("convolutions")
    cache = StatisticsCache(tmp_path / "cache")
    found = [
        statistics_of(
            checked_task(model, data, parameters, settings=settings),
            ["moments"],
            cache=cache,
            key="k",
        )
        for settings in (fp.Settings(offload=tmp_path), fp.Settings())
    ]
    assert [each.cached for each in found] == [False, True]
    for letter, named in found[0].parts.items():
        assert all(torch.equal(t, found[1].parts[letter][n]) for n, t in named.items())


def augmented(x, y):
    """Return batches with random noise that is drawn from a generator of their own."""
    noise = torch.Generator().manual_seed(0)

    class Batches:
        def __iter__(self):
            yield x + torch.randn(x.shape, generator=noise), y

    return Batches()


class Shrinking(Counted):
    """Batches of which there is one less each time."""

    def __iter__(self):
        self.times += 1
        return iter(self.batches[: len(self.batches) + 1 - self.times])


def test_batches_that_are_others_each_time_are_refused():
    model, data, parameters = case("convolutions")
    limit = {"max_accumulator_bytes": 1925 * 24, "parameters": parameters}
    other = (
        r"gradient_moments: batches must hold the same samples in each of the 2 passes "
        r"that max_accumulator_bytes leads to, but in pass 1 "
    )
    with pytest.raises(fp.FisherpruneError, match=other + "batch 0 is another; a Data"):
        fp.gradient_moments(model, augmented(*data[0]), **limit)
    with pytest.raises(fp.FisherpruneError, match=other + "batch 1 is another; "):
        swapped = iter([data, [data[0], *data[:0:-1]]])
        reader = type("Swapped", (), {"__iter__": lambda self: iter(next(swapped))})()
        fp.gradient_moments(model, reader, **limit)
    with pytest.raises(fp.FisherpruneError, match=other + "of 4 batches came 3"):
        fp.gradient_moments(model, Shrinking(data), **limit)
    with pytest.raises(
        fp.FisherpruneError,
        match="batches must be a list, a DataLoader or the like: max_accumulator_bytes "
        "leads to 2 passes over them, got list_iterator",
    ):
        fp.gradient_moments(model, iter(data), **limit)
    enough = limit | {"max_accumulator_bytes": 10**6}
    assert fp.gradient_moments(model, iter(data), **enough).samples == 13


def test_shuffling_data_loaders_are_read_in_the_same_order(tmp_path):
    model, _, parameters = case("convolutions")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*data((3, 9, 9))), batch_size=4, shuffle=True
    )
    torch.manual_seed(3)
    expected = fp.gradient_moments(model, loader, parameters=parameters, group_size=3)
    torch.manual_seed(3)
    limit = {"max_accumulator_bytes": 1925 * 28, "group_size": 3}
    found = fp.gradient_moments(model, loader, parameters=parameters, **limit)
    assert_same(found, expected)


def test_refusals(tmp_path):
    model, data, parameters = case("convolutions")
    with pytest.raises(
        fp.FisherpruneError,
        match="max_accumulator_bytes must be at least 46200, the bytes of the sums of "
        "'9.weight', or None with offload, where no sum is kept beside the "
        "parameters, got 46199",
    ):
        limit = {"max_accumulator_bytes": 46199, "parameters": parameters}
        fp.gradient_moments(model, data, **limit)
    for value in (0, -1, 2e9, "1G", True):
        with pytest.raises(
            fp.FisherpruneError,
            match="max_accumulator_bytes must be an integer of at least 1, got",
        ):
            fp.gradient_moments(model, data, max_accumulator_bytes=value)
    (tmp_path / "file").touch()
    for value in ("cuda", "", 3, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(
            fp.FisherpruneError,
            match="offload must be None, 'cpu' or a folder that is there, got",
        ):
            fp.Settings(offload=value)
    for code, name in (("grasp", "hessian"), ("synflow", "synaptic_flow")):
        for settings in ({"offload": "cpu"}, {"max_accumulator_bytes": 10**9}):
            with pytest.raises(
                fp.FisherpruneError,
                match=f"must be None for the pass {name}; gauss_newton, moments, "
                "gradient heed it, got",
            ):
                fp.score(model, data, code, settings=fp.Settings(**settings))


def test_a_folder_without_room_is_an_error(tmp_path):
    model, data, _ = case("convolutions")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            fp.FisherpruneError,
            match=r"offload: the folder .* must hold \d+ bytes more: File too large",
        ):
            fp.gradient_moments(model, data, offload=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@contextmanager
def memory_for(more):
    """Let the process have so many bytes more than now, not counting mapped files."""
    mallopt, threshold = ctypes.CDLL(None).mallopt, -3
    mallopt(threshold, 1 << 20)  # what is larger is given back, no pieces are left
    status = Path("/proc/self/status").read_text()
    now = int(status.split("VmData:")[1].split()[0]) << 10
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        mallopt(threshold, 32 << 20)


def mapped(folder, tensor):
    """Return whether a tensor is in memory that is mapped from a file of a folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(n, 16) for n in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return f"{folder}/" in line and line.endswith("(deleted)")
    return False


def test_what_is_mapped_takes_no_memory(tmp_path):
    """Moments, their file, scores and masks of 10 million weights, 40 MB as float32."""
    model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(10)))
    batch = torch.randn(4, 1000), torch.randint(1000, (4,))
    options = {"parameters": dict(model.named_parameters())}
    fp.gradient_moments(model[:2], [batch])  # the process keeps some memory
    with memory_for(40_000_000):
        found = fp.gradient_moments(model, [batch], **options, offload=tmp_path)
        found.save(tmp_path / "a.safetensors")
        limit = {"max_accumulator_bytes": 3 * 24 * 1000**2, "offload": tmp_path}
        parts = fp.gradient_moments(model, [batch], **options, **limit)
        options["settings"] = fp.Settings(offload=tmp_path)
        scores = fp.score(model, [batch], "fisher_diag", **options)
        masks = fp.select_masks(scores, 0.75)  # 10 MB
    for named in (found.sum, found.sum_sq, scores):
        assert all(mapped(tmp_path, tensor) for tensor in named.values())
    loaded = fp.GradientMoments.load(tmp_path / "a.safetensors")
    for name, score in scores.items():
        for part in ("sum", "sum_sq"):
            expected = getattr(loaded, part)[name]
            assert torch.equal(getattr(found, part)[name], expected)
            assert torch.equal(getattr(parts, part)[name], expected)
        assert torch.equal(score, loaded.sum_sq[name] / 4)
    assert masks.kept() == 2_500_000
    least = min(scores[name][mask].min() for name, mask in masks.items())
    assert all(scores[name][~mask].max() <= least for name, mask in masks.items())
