"""The equipment of the benchmarks: refuses wrong results, writes files whole."""

import json
import subprocess

import numpy as np
import pytest
import torch

from benchmarks import __main__ as everything
from benchmarks import (
    curvature,
    end_to_end,
    harness,
    moments,
    processes,
    readme,
    record,
    rounds,
    targets,
    topk,
    training,
    zoo,
)
from benchmarks.gpu import cases
from benchmarks.harness import Timing, WrongResult, race, verify
from fisherprune.ops import reference
from fisherprune.runs.metrics import Metrics

NAN = float("nan")


@pytest.mark.parametrize(
    ("got", "expected", "tolerance", "message"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 0, "x: holds NaN"),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), 1, "x: holds NaN"),
        (torch.tensor([1.0, 2.0]), torch.tensor([NAN, 2.0]), 1, "x: holds NaN"),
        (NAN, NAN, 0, "x: holds NaN"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 0, "x: 1 of 2 entries"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-2, "x: relative error"),
        (torch.tensor([0.1]), torch.tensor([0.0]), 1e-2, "x: relative error inf"),
        (torch.tensor([NAN]).int(), torch.tensor([1]).int(), 1, "x: 1 of 1 entries"),
        (torch.ones(2), torch.ones(2, 1), 0, r"x: must have shape \[2, 1\], got \[2\]"),
        ([1.0, 1.0], torch.ones(2), 0, r"x: must have shape \[2\], got list"),
        (torch.ones(2), torch.ones(2).double(), 0, "x: must be torch.float64"),
        ([torch.ones(2)], [torch.ones(2)] * 2, 0, "x: must be a sequence of 2"),
        ([torch.ones(2), 3], [torch.ones(2), 4], 0, r"x\[1\]: must be 4, got 3"),
        ({"a": 1.0}, {"a": 2.0}, 0.1, r"x\['a'\]: relative error"),
        ({"a": 1.0}, {"b": 1.0}, 0, r"x: must be a mapping with keys \['b'\]"),
        ("a", "b", 0, "x: must be 'b', got 'a'"),
    ],
)
def test_verify_refuses(got, expected, tolerance, message):
    with pytest.raises(WrongResult, match=message):
        verify("x", got, expected, tolerance=tolerance)


def test_verify_accepts_what_is_equal_or_near_enough():
    nest = ([torch.ones(3), torch.tensor([True])], {"a": 2.0}, 3, float("inf"))
    verify("x", nest, nest)
    verify("x", torch.tensor([1.0, 1e-8]), torch.tensor([1.0, 0.0]), tolerance=1e-6)
    verify("x", torch.ones(2), torch.ones(2).double(), tolerance=1e-6)


def test_nothing_is_timed_before_all_is_checked():
    calls = []
    competitors = {name: lambda name=name: calls.append(name) or name for name in "ab"}

    def check(name, result):
        verify(name, result, "a")

    with pytest.raises(WrongResult, match="b: must be 'a', got 'b'"):
        race(competitors, check)
    assert calls == ["a", "b"]


def test_race_rotates_the_order_and_repeats_short_calls(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock) / 1e3)
    monkeypatch.setattr(harness, "LEAST_MS", 2)
    order = []
    competitors = {name: lambda name=name: order.append(name) for name in "ab"}
    times = race(competitors, lambda name, result: None, rounds=2)
    # Checked once, warmed up once, then two calls a sample as one takes 1 ms.
    assert "".join(order) == "ab" + "ab" + "aabb" + "bbaa"
    assert times["a"].samples == pytest.approx((0.5, 0.5))


def test_quantiles_and_ratios():
    slow, fast = Timing((9.0, 1.0, 4.0, 3.0, 100.0)), Timing((2.0, 2.0))
    assert slow.median == 4
    row = slow.row(note="n")
    assert row == {"ms": 4, "q1": 3, "q3": 9, "rounds": 5, "note": "n"}
    assert harness.ratios({"s": slow, "f": fast}, "f") == {"s": 2, "f": 1}


def test_ceilings_are_positive_and_finite():
    found = harness.ceilings(megabytes=1, rounds=1)
    assert list(found) == ["sgemm_gflops", "copy_gbs", "read_gbs"]
    assert all(0 < value < 1e6 for value in found.values())


def test_peak_memory_sees_what_is_freed_again():
    megabyte = 1 << 20

    def call():
        torch.ones(64 * megabyte)  # 256 MB, freed at once
        return torch.ones(megabyte)

    peak = harness.peak_extra_bytes(call)
    assert 250 * megabyte < peak < 300 * megabyte


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "result.json"
    record.write_json(path, {"rows": [1.5]})
    with pytest.raises(ValueError, match="Out of range float values"):
        record.write_json(path, {"rows": [NAN]})
    assert json.loads(path.read_text()) == {"rows": [1.5]}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_table_is_aligned():
    rows = [{"name": "a", "ms": 1.23456}, {"name": "long", "n": 12345, "ms": None}]
    assert record.table(rows).splitlines() == [
        "name     ms       n",
        "a     1.235       -",
        "long      -  12,345",
    ]


def test_finish_records_where_it_was_measured(tmp_path, capsys):
    rows, limits = [{"name": "a", "ms": 1.0}], {"read_gbs": 30.0}
    path = record.finish("demo", rows, limits, "cpu", tmp_path / "demo.json")
    found = json.loads(path.read_text())
    assert (found["benchmark"], found["rows"]) == ("demo", rows)
    assert found["ceilings"] == limits
    place = found["environment"]
    assert place["torch"] == torch.__version__
    assert {"device", "cpu", "cores", "threads", "commit", "dirty", "date"} < set(place)
    assert place["peers"]["numpy"] == np.__version__
    assert "name" in capsys.readouterr().out


def test_what_the_benchmarks_write_makes_no_source_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    files = tmp_path / "benchmarks" / "results" / "a.json", tmp_path / "setup.py"
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.write_text("before")
    name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    for file, dirty in zip(files, (False, True), strict=True):
        file.write_text("after")
        assert record.environment()["dirty"] is dirty


@pytest.mark.parametrize(
    "dirty, shown", [(True, "a+changes."), (False, "a."), (None, "a.")]
)
def test_the_readme_says_where_sources_were_changed(dirty, shown):
    place = record.environment() | {"commit": "aaaaaaaaaabb", "dirty": dirty}
    assert readme.source({"environment": place}).endswith(f", commit aaaaaaaaa{shown}")


def test_rows_are_per_image_but_for_their_rounds():
    times = {"fisherprune": Timing((8.0, 8.0, 8.0)), "x": Timing((16.0, 16.0))}
    ours, other = end_to_end.rows_of(("net", 4, 32), 2, times)
    assert [ours[q] for q in ("ms", "q1", "q3", "rounds")] == [1, 1, 1, 3]
    assert [other[q] for q in ("ms", "rounds", "to ours", "ours to it")] == [
        2,
        2,
        2,
        0.5,
    ]


TIMED = [
    part.main
    for part in (topk, training, moments, end_to_end, curvature, zoo, rounds, processes)
]


@pytest.mark.parametrize("main", [*TIMED, everything.main])
@pytest.mark.parametrize("number", ["0", "-3", "1.5", "many"])
def test_rounds_are_at_least_one(main, number, capsys):
    message = f"argument --rounds: must be a whole number of at least 1, got '{number}'"
    check_one_line(main, ["--rounds", number], message, capsys)


def check_one_line(main, command, message, capsys):
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert err.startswith("python -m benchmarks") and err.count("\n") == 1
    assert (out, err.endswith(f": error: {message}\n")) == ("", True)


@pytest.mark.parametrize("main", [*TIMED, everything.main, targets.main, readme.main])
def test_a_wrong_flag_is_one_line(main, capsys):
    check_one_line(main, ["--zzz=3"], "unrecognized arguments: --zzz=3", capsys)


@pytest.mark.parametrize("device", ["cuad", "cuda:99"])
@pytest.mark.parametrize("main", [*TIMED, cases.main])
def test_devices_must_be_there(main, device, capsys):
    message = f"must be a device that torch can use here, got '{device}'"
    command = ["--device", device]
    check_one_line(main, command, f"argument --device: {message}", capsys)


@pytest.mark.parametrize(
    ("main", "option"),
    [
        (topk.main, "--max-scores"),
        (moments.main, "--batch"),
        (training.main, "--batch"),
        (training.main, "--batches"),
        (training.main, "--threads"),
        (processes.main, "--processes"),
    ],
)
def test_counts_are_at_least_one(main, option, capsys):
    message = f"argument {option}: must be a whole number of at least 1, got '0'"
    check_one_line(main, [option, "0"], message, capsys)


def test_all_benchmarks_run_one_after_the_other_until_one_fails(monkeypatch, capsys):
    commands, status = [], {"benchmarks.end_to_end": 3}

    def run(command, check):
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, status.get(command[2], 0))

    monkeypatch.setattr(everything.subprocess, "run", run)
    assert everything.main(["--rounds", "2", "--plot"]) == 3
    names = ["topk", "moments", "end_to_end"]
    assert commands == [[f"benchmarks.{n}", "--rounds", "2", "--plot"] for n in names]
    status.clear()
    assert everything.main([]) == 0
    assert "resnet18: epoch over bare loop" in capsys.readouterr().out


def test_targets_judge_the_committed_results(capsys, monkeypatch, tmp_path):
    assert targets.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(targets.TARGETS) + 1
    monkeypatch.setattr(targets, "RESULTS", tmp_path)
    assert targets.main(["--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = f"{targets.TARGETS[0].what}: not measured, end_to_end-cuda.json is missing"
    assert lines[0] == first


def test_a_models_total_has_the_spread_of_its_rounds(monkeypatch):
    layers = [moments.Layer(3, 5, 6), moments.Layer(5, 4, 0, kernel=1, count=2)]
    monkeypatch.setitem(moments.MODELS, "tiny", layers)
    monkeypatch.setattr(harness, "LEAST_MS", 0.01)
    first, second, total = moments.rows_of("tiny", 4, "cpu", 3, {"sgemm_gflops": 1.0})
    assert (total["layer"], total["rounds"]) == ("total per image", 3)
    for prefix in ("", "torch "):
        q1, ms, q3 = (total[prefix + q] for q in ("q1", "ms", "q3"))
        assert 0 < q1 <= ms <= q3
    timings = [(1, {"x": Timing((1.0, 9.0))}), (2, {"x": Timing((4.0, 2.0))})]
    assert moments.total_per_image(timings, "x", 2).samples == (4.5, 6.5)


def test_topk_peers_make_the_masks_that_follow_from_the_ranks():
    scores = topk.make_scores(5_000, "cpu")
    assert sum(s.numel() for s in scores) == 5_000
    truth = topk.exact_masks(scores, [500])
    verify("reference", truth, reference.global_topk(scores, [500])[0])
    for name, peer in topk.peers("cpu").items():
        verify(name, [peer(scores, 500)], truth)


def test_topk_writes_rows_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(topk, "SIZES", [30_000, 10, 2_000])
    monkeypatch.setattr(topk, "keep_freed_memory", lambda: None)  # of this process
    monkeypatch.setattr(harness, "LEAST_MS", 0.01)
    path = tmp_path / "topk.json"
    command = ["--rounds", "1", "--max-scores", "40000", "--output", str(path)]
    assert topk.main(command) == 0
    rows = json.loads(path.read_text())["rows"]
    cases = {"keep 10 %", "sparsities", "new memory", "scaling"}
    assert {r["case"] for r in rows} == cases
    pytest.importorskip("matplotlib")
    topk.plot(rows, path.with_suffix(".png"))
    assert path.with_suffix(".png").stat().st_size > 1000


class Anywhere(torch.nn.Module):
    """A network that is quickly there."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 2, 3, stride=16)
        self.linear = torch.nn.Linear(2, num_classes)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).mean((2, 3)))


def in_a_rank(case):
    """Measure a network of the tests in a process of its own."""
    processes.network = lambda name, device: Anywhere(10).eval()
    quick = {n: p for n, p in end_to_end.PEERS.items() if not isinstance(p, type)}
    end_to_end.PEERS = quick  # the others take seconds to import
    return processes.measure(case)


def lying(case):
    """Measure where a process forgets the others."""
    processes.Ranks.add_up = lambda ranks, sums: None
    return in_a_rank(case)


def test_processes_are_verified_and_then_timed(monkeypatch):
    monkeypatch.setattr(processes, "measure", in_a_rank)
    case = processes.Case("tiny", 5, "cpu", 2)
    rows = processes.compare(case, [1, 2])
    assert {row["processes"] for row in rows} == {1, 2}
    assert all(row[k] > 0 for row in rows for k in ("ms", "to ours", "speedup"))
    text = "\n".join(readme.processes({"rows": rows}))
    assert "| **fisherprune** | 2 | " in text and "| one-image loop | 1 | " in text
    monkeypatch.setattr(processes, "measure", lying)
    with pytest.raises(WrongResult, match="forward"):
        processes.compare(case, [2])


class Barely(torch.nn.Module):
    """As small as a network with a mask can be."""

    def __init__(self, classes, channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 2, 3)
        self.linear = torch.nn.Linear(2, classes)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).mean((2, 3)))


class Forgetful(training.Checkpoint):
    """Saves other weights."""

    def save(self, state, then=None):
        model = {name: t + 1 for name, t in state["model"].items()}
        super().save(state | {"model": model}, then)


def test_training_writes_rows_and_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(training.models.MODELS, "resnet20", Barely)
    path = tmp_path / "training.json"
    command = "--rounds 2 --batch 4 --batches 2 --network resnet20 --what float32 amp"
    assert training.main([*command.split(), "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["what"] for row in rows] == ["float32", "amp"]
    assert rows[0]["speedup"] == 1
    assert all(row[k] > 0 for row in rows for k in ("over bare", "160 epochs, h"))
    pytest.importorskip("matplotlib")
    training.plot(rows, path.with_suffix(".png"))
    assert path.with_suffix(".png").stat().st_size > 1000


def test_training_times_nothing_that_trains_otherwise(monkeypatch):
    monkeypatch.setitem(training.models.MODELS, "resnet20", Barely)
    update = training.Trainer.prune

    def half(trainer, masks):
        update(trainer, type(masks)({k: m & False for k, m in masks.items()}))

    monkeypatch.setattr(training.Trainer, "prune", half)
    with pytest.raises(WrongResult, match="ours: relative error"):
        training.measure(training.Case("resnet20", "float32", "cpu", 4, 2), 1)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("evaluate", lambda *_: Metrics(99.0, 0, 0, 0, 0), "validation: relative"),
        ("Checkpoint", Forgetful, "checkpoint"),
    ],
)
def test_validations_and_checkpoints_are_right_before_they_are_timed(
    name, wrong, message, monkeypatch
):
    monkeypatch.setitem(training.models.MODELS, "resnet20", Barely)
    monkeypatch.setattr(training, name, wrong)
    with pytest.raises(WrongResult, match=message):
        training.measure(training.Case("resnet20", "float32", "cpu", 4, 2), 1)
