"""The numbers a GPU must reach, measured on the CPU with tiny sizes."""

import os

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherprune as fp
from benchmarks import end_to_end, harness, moments, peers, topk, training
from benchmarks.gpu import cases, kernels, measure, networks, profiles, wgmma
from benchmarks.gpu.measure import Goal, row


@pytest.mark.parametrize(
    ("goal", "samples", "holds", "target"),
    [
        (Goal(2, aim=0.8), [1.0, 3.0, 2.0], True, "<= 2"),
        (Goal(2), [1.0, 3.0, 2.1], False, "<= 2"),
        (Goal(0.35, at_most=False), [0.34, 0.36, 0.35], True, ">= 0.35"),
        (Goal(100, at_most=False), [99.0], False, ">= 100"),
    ],
)
def test_rows_are_judged_by_their_median(goal, samples, holds, target):
    found = row("a", "x", samples, goal, more=1)
    assert (found["holds"], found["target"], found["n"]) == (
        holds,
        target,
        len(samples),
    )
    assert found["q1"] <= found["value"] <= found["q3"]
    assert found.get("aim") == goal.aim
    assert found["more"] == 1
    assert "target" not in row("a", "x", samples)


def test_the_kernels_of_a_switch_are_verified_and_timed_in_turn(short, monkeypatch):
    monkeypatch.setenv(wgmma.SWITCH, "")
    seen = []
    real = wgmma.prepared

    def prepared(*rest):
        seen.append(os.environ[wgmma.SWITCH])
        return real(*rest)

    monkeypatch.setattr(wgmma, "prepared", prepared)
    layers = [moments.Layer(3, 5, 6)]
    (found,) = wgmma.compare("cpu", 4, layers, rounds=4, check=lambda _: None)
    assert seen == ["0", "1"] * 4 and os.environ[wgmma.SWITCH] == ""
    assert found["n"] == 4 and found["target"] == ">= 1"
    assert max(found["error"] + found["present_error"]) < 1e-5
    assert [str(layer) for layer in wgmma.LAYERS] == [
        *("conv3x3 64-64 at 32", "conv3x3 128-128 at 16"),
        *("conv3x3 256-256 at 8", "conv3x3 512-512 at 4"),
    ]
    with pytest.raises(measure.NotHere, match="needs kernels built with"):
        list(wgmma.compare("cpu"))


def test_precision_is_put_back_after_an_error():
    before = torch.backends.cudnn.conv.fp32_precision
    with pytest.raises(KeyError), measure.precision("tf32"):
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        raise KeyError
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(harness, "LEAST_MS", 0.01)


def names(rows):
    assert all(r["n"] >= 1 and r["value"] == r["value"] for r in rows)
    return [r["name"] for r in rows]


def test_small_cases_hold_on_the_cpu(capsys):
    assert cases.main(["--device", "cpu"]) == 0
    assert "right" in capsys.readouterr().out


def test_the_largest_layers_are_run_and_verified(capsys, monkeypatch):
    small = [moments.Layer(3, 5, 6), moments.Layer(5, 3, 4)]
    monkeypatch.setattr(cases, "largest_layers", lambda: small)
    command = ["--largest", "--batch", "4", "--device", "cpu"]
    assert cases.main(command) == 0
    assert capsys.readouterr().out == "2 layers, batch 4: right\n"
    monkeypatch.setattr(moments, "true_moments", lambda *_: torch.zeros(2))
    with pytest.raises(harness.WrongResult, match="sum, conv3x3 3-5 at 6"):
        cases.main(command)


def test_rates(short):
    found = measure.limits("cpu", n=64, megabytes=1)
    assert list(found) == [
        *("fp32_matmul_tflops", "tf32_matmul_tflops", "bf16_matmul_tflops"),
        *("copy_gbs", "read_gbs"),
    ]
    assert all(0 < value < 1e4 for value in found.values())


@pytest.fixture
def small_network(short, monkeypatch):
    # Smooth: at a kink rounding errors would decide what a gradient is.
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=5), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)
    ).eval()
    monkeypatch.setattr(end_to_end, "network", lambda *_: model)


def test_scoring(small_network):
    found = list(networks.scoring("cpu", "net", 11, 4, looped=2, rounds=1))
    assert names(found)[0].startswith("net, 11 images: exact fts scores")
    assert found[0]["error"] < 1e-5
    assert found[1]["name"] == f"{found[0]['name']}, CUDA graph"
    assert found[2]["value"] / found[0]["value"] == pytest.approx(found[3]["value"])


@pytest.mark.parametrize(("backend", "how"), [(None, "eager"), ("eager", "compiled")])
def test_passes_of_few_and_of_many_batches(small_network, backend, how):
    """The backend "eager" of torch.compile traces and compiles nothing."""
    found = list(networks.passes("cpu", "net", 2, (1, 3), 1, backend))
    ways = [
        f"gradient_moments over {how} forward + backward",
        "gradient_moments",
        f"{how} forward + backward",
        *["gradient_moments, CUDA graph over without"] * (how == "eager"),
    ]
    assert names(found) == [
        f"net, {count} batches of 2, TF32: {way}" for count in (1, 3) for way in ways
    ]
    for over, ours, plain, *_ in (found[: len(ways)], found[len(ways) :]):
        assert over["value"] == pytest.approx(plain["value"] / ours["value"])
        assert ("target" in over) == (how == "eager")


def test_a_pass_without_a_graph_says_why(small_network):
    *_, found = networks.passes("cpu", "net", 2, (4,), 1)
    assert "the model must be on cuda, got cpu" in found["warned"][0]


def test_a_pass_with_a_graph(small_network, cpu_graphs):
    *_, found = networks.passes("cpu", "net", 2, (4,), 1)
    assert found["name"].endswith("CUDA graph over without")
    assert cpu_graphs.replays and "warned" not in found


def test_plain_passes_that_find_another_gradient_are_not_timed(
    small_network, monkeypatch
):
    right = peers.plain_pass
    twice = lambda *a: {n: (2 * m,) for n, (m,) in right(*a).items()}  # noqa: E731
    monkeypatch.setattr(peers, "plain_pass", twice)
    with pytest.raises(harness.WrongResult, match="forward.*relative error 1.00e"):
        list(networks.passes("cpu", "net", 2, (1,), 1))


def test_memory(small_network):
    above, ours = networks.memory("cpu", "net", 2, rounds=1)
    assert above["name"].endswith("peak memory above forward + backward")
    assert ours["unit"] == "MB"


def test_kernels_of_a_pass(small_network):
    found = list(profiles.profile("cpu", "net", 2, 2))
    tables = {name: t for part in found for name, t in part["profile"].items()}
    place = "net, 2 batches of 2, TF32"
    assert list(tables) == [
        f"{place}: gradient_moments",
        f"{place}: forward + backward",
    ]
    ours, plain = ({row["kernel"]: row for row in t} for t in tables.values())
    assert ours["fisherprune::grad_moments"]["calls"] == 2
    assert "fisherprune::grad_moments" not in plain
    for rows in tables.values():
        times = [row["us"] for row in rows]
        assert times == sorted(times, reverse=True)
        assert all(0 < row["share"] < 1 for row in rows)
    numbers = {row["name"]: row["value"] for part in found for row in part["rows"]}
    for name, table in tables.items():
        calls = sum(row["calls"] for row in table)
        assert numbers[f"{name}: launches of a batch"] >= calls / 2 > 0
        assert numbers[f"{name}: time of all kernels over that of the pass"] > 0


def test_training_is_extrapolated(short, monkeypatch):
    class Barely(nn.Sequential):
        def __init__(self, classes, channels):
            pool, flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
            super().__init__(nn.Conv2d(channels, 2, 3), pool, flat)
            self.linear = nn.Linear(2, classes)

    monkeypatch.setitem(training.models.MODELS, "resnet20", Barely)
    found = list(networks.train("cpu", "resnet20", 4, 2, rounds=2, variants=["amp"]))
    place = "training of resnet20, amp, TF32, batch 4"
    whole, over = found
    assert names(found) == [
        *(f"{place}: 160 epochs, from 2", f"{place}: epoch over bare loop"),
    ]
    steps_alone = 160 * 40_000 / whole["images_per_second"]
    assert whole["value"] > steps_alone
    assert over["target"] == "<= 1.05"


def test_wrong_scores_are_not_timed(small_network, monkeypatch):
    right = fp.score
    wrong = lambda *a: {n: s * 1.1 for n, s in right(*a).items()}  # noqa: E731
    monkeypatch.setattr(fp, "score", wrong)
    with pytest.raises(harness.WrongResult, match="scores"):
        next(networks.scoring("cpu", "net", 3, 2, looped=1, rounds=1))


def test_kernels(short):
    layers = kernels.largest_layers()
    assert [str(la) for la in layers] == [
        *("conv3x3 64-64 at 32", "conv3x3 128-128 at 16", "conv3x3 256-256 at 8"),
        *("conv3x3 512-512 at 4", "conv3x3 512-512 at 2"),
    ]
    small = [moments.Layer(3, 5, 6)]
    (found,) = kernels.kernel("cpu", 4, small, n=64, rounds=2)
    assert found["n"] == 2
    assert found["value"] * found["matmul_tflops"] == pytest.approx(found["tflops"])
    assert found["target"] == ">= 0.35"
    few_positions = [moments.Layer(3, 5, 2)]
    (found,) = kernels.kernel("cpu", 4, few_positions, n=64, rounds=1)
    assert "target" not in found
    stored = list(kernels.large_images("cpu", 4, small, n=64, rounds=1))
    assert ["channels_last" in found["name"] for found in stored] == [False, True]
    both = list(kernels.sequences("cpu", 4, 9, (8, 16), n=64, rounds=2))
    for setting, found in zip(("ieee", "tf32"), both, strict=True):
        assert setting in found["name"]
        share = found["tflops"] / found["matmul_tflops"]
        assert found["value"] == pytest.approx(share)
    (found,) = kernels.large_selection("cpu", 1 << 16, megabytes=1, rounds=2)
    assert found["value"] > 0 and found["aim"] == 0.8


def test_selections(short):
    # Of 2^19 normal numbers some thousand pairs are equal.
    found = list(kernels.selection("cpu", 1 << 19, rounds=2))
    assert [name.split(": ")[1] for name in names(found)] == [
        *("global_topk, device time", "global_topk, five sparsities, device time"),
        *("global_topk, device time", "select_masks, wall clock"),
        *("cat + topk + masks, wall clock", "cat + topk + masks over select_masks"),
    ]
    assert "equal ones cut" in found[2]["name"] and found[2]["equal_to_threshold"] > 1


def test_cuts_between_equal_scores():
    ordered = torch.tensor([5.0, 5, 4, 3, 3, 3, 1])
    assert [kernels.first_cut(ordered, k) for k in (1, 2, 4, 5)] == [1, 4, 4, 5]
    with pytest.raises(ValueError, match="no two of the scores"):
        kernels.first_cut(ordered, 6)
    scores = [torch.tensor([[3.0, 1], [5, 3]]), torch.tensor([4.0, 3, 5])]
    first, second = kernels.tied_masks(scores, 3.0, 5)
    assert first.tolist() == [[True, False], [True, True]]
    assert second.tolist() == [True, False, True]


def test_wrong_ties_are_not_timed(short, monkeypatch):
    right = kernels.tied_masks
    monkeypatch.setattr(kernels, "tied_masks", lambda s, t, k: right(s, t, k + 1))
    with pytest.raises(harness.WrongResult, match="global_topk"):
        list(kernels.selection("cpu", 1 << 19, rounds=1))


def test_a_cold_cache_is_clean(monkeypatch):
    """The last thing done to it is a read."""
    done = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            done.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(harness, "FLUSH_BYTES", 1 << 10)
    cache = harness.ColdCache("cpu")
    with Log():
        cache.fill(2)
    assert done == ["zero_", "zero_", "sum"]


def test_scattered_scores_have_every_rank_once():
    scores = torch.cat(kernels.scattered_scores(1 << 16, "cpu"))
    ranks = scores.view(torch.int32) - topk.LEAST_BITS
    assert torch.equal(ranks.sort().values, torch.arange(1 << 16, dtype=torch.int32))
    assert scores.isfinite().all()
    parts = kernels.scattered_scores(1 << 16, "cpu")
    assert all(part.storage_offset() % 4 == 0 for part in parts)
