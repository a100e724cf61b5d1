"""The numbers of the report: cells, groups, files."""

import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import result_trees as trees
from html_page import Page
from result_trees import made, rows

from fisherprune import report, train
from fisherprune.masks.masks import Masks
from fisherprune.report import load, overlap, settings, tables
from fisherprune.report.__main__ import main
from fisherprune.report.pages.csv_files import runs_csv, summary_csv
from fisherprune.runs.config import TrainConfig

pytest.importorskip("matplotlib")


def test_cells_are_means_and_sample_deviations(study):
    folder, accuracies = study
    cells = {
        (r["method"], float(r["sparsity"]), r["weights"]): r
        for r in rows(summary_csv(made(folder)))
    }
    assert len(cells) == 8
    for (method, sparsity, weights), row in cells.items():
        values = [
            100 * pair[weights == "last"]
            for (m, s, _), pair in accuracies.items()
            if (m, s) == (method, sparsity)
        ]
        assert int(row["n"]) == len(values)
        assert float(row["mean"]) == pytest.approx(sum(values) / len(values))
        if len(values) == 1:
            assert row["std"] == ""
        else:
            assert float(row["std"]) == pytest.approx(statistics.stdev(values))


def test_runs_come_back_from_csv(study):
    folder, accuracies = study
    found = rows(runs_csv(made(folder)))
    assert len(found) == len(accuracies)
    for row in found:
        key = row["method"], float(row["sparsity"]), int(row["seed"])
        assert float(row["test_best_accuracy"]) == accuracies[key][0]
        assert float(row["test_last_accuracy"]) == accuracies[key][1]
        assert row["torch"] == "2.15.0"
    assert "lr" not in found[0]  # does not vary


def test_varying_fields_get_columns_and_settings_of_their_own(tmp_path):
    trees.add_run(tmp_path, 0.5, lr=0.1)
    trees.add_run(tmp_path, 0.6, lr=0.2, shuffle_masks=True)
    trees.add_run(tmp_path, 0.7, lr=0.2, skip=("bn",))
    labels = [each.label for each in made(tmp_path).tables]
    assert sorted(labels) == ["lr=0.1", "shuffle_masks, lr=0.2", "skip=bn, lr=0.2"]
    found = rows(runs_csv(made(tmp_path)))
    assert {row["lr"] for row in found} == {"0.1", "0.2"}
    assert {row["shuffle_masks"] for row in found} == {"True", "False"}


def test_equal_results_give_equal_bytes(study, tmp_path):
    folder, _ = study
    first, second = tmp_path / "a", tmp_path / "b"
    report.write_report([folder], first)
    subprocess.run(
        [sys.executable, "-m", "fisherprune.report", folder, "--output", second],
        env=os.environ | {"PYTHONHASHSEED": "1", "TZ": "JST-9"},
        cwd=Path(report.__file__).parents[2],
        check=True,
    )
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert len(list(first.iterdir())) == 5


def test_dense_runs_stand_in_every_table_with_their_training(tmp_path):
    trees.add_run(tmp_path, 0.9, method="none", sparsity=0.0, seed=3)
    trees.add_run(tmp_path, 0.8, method="none", sparsity=0.0, lr=0.5)
    trees.add_run(tmp_path, 0.5, method="fts")
    trees.add_run(tmp_path, 0.4, method="fts", shuffle_masks=True)
    trees.add_run(tmp_path, 0.3, method="fts", warmup_epochs=1)
    groups = made(tmp_path).tables
    dense = {x.label: x.dense and x.dense.mean("best") for x in groups}
    assert dense == {
        "default setting": pytest.approx(90),
        "shuffle_masks": pytest.approx(90),
        "warmup_epochs=1": None,
        "lr=0.5": pytest.approx(80),
    }
    assert {x.label: bool(x.cells) for x in groups}["lr=0.5"] is False


def test_dense_runs_alone_make_a_table(tmp_path, capsys):
    trees.add_run(tmp_path, 0.75, method="none", sparsity=0.0)
    assert main([str(tmp_path), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "sparsity   accuracy\ndense     75.00 (1)\n" in out
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert "75.00" in page.texts
    assert "| dense | 75.00 (1) |" in (tmp_path / "report" / "report.md").read_text()


def test_seeds_count_once(tmp_path):
    folder = trees.add_run(tmp_path, 0.5, seed=1)
    trees.add_run(tmp_path, 0.6, seed=1, device="cpu")  # the same run elsewhere
    trees.add_run(tmp_path, 0.7, seed=2)
    found = load.load([tmp_path, folder])  # and one given twice
    assert [run.config.seed for run in found.finished] == [1, 2]
    assert [x.text for x in found.repeated] == [
        f"is the same run as {found.finished[0].name}"
    ]
    assert found.problems == []


def test_settings_in_words():
    config = TrainConfig(skip=("bias", "bn"), lr_drops=(), batch_size=512, lr=0.5)
    fields = settings.setting(config)
    assert settings.label(fields) == "skip=bias+bn, lr=0.5, lr_drops=none"
    assert settings.setting(TrainConfig(method="snip", seed=4)) == {}


def test_the_highest_mean_is_marked_and_ties_are_shared(tmp_path):
    for method, accuracy in (("snip", 0.9), ("fts", 0.9), ("random", 0.8)):
        trees.add_run(tmp_path, accuracy, method=method)
    trees.add_run(tmp_path, 0.7, method="snip", sparsity=0.5)
    (each,) = tables.result_tables(load.load([tmp_path]).finished)
    assert each.highest(0.9, "best") == {"snip", "fts"}
    assert each.highest(0.5, "best") == set()  # nothing to be higher than


def test_jaccard_is_the_mean_over_common_seeds(tmp_path):
    folders = {
        (method, seed): trees.add_run(tmp_path, 0.5, method=method, seed=seed)
        for method in ("snip", "fts", "random")
        for seed in (0, 1)
    }
    (folders["random", 1] / overlap.MASKS).unlink()
    (each,) = tables.result_tables(load.load([tmp_path]).finished)
    (found,) = overlap.with_overlaps(each, [], lambda text: None).overlaps

    def bits(method, seed):
        masks = Masks.load(folders[method, seed] / overlap.MASKS)
        return {
            (k, i) for k, m in masks.items() for i in m.nonzero().flatten().tolist()
        }

    for a, b, seeds in (("snip", "fts", (0, 1)), ("snip", "random", (0,))):
        pairs = [(bits(a, seed), bits(b, seed)) for seed in seeds]
        truth = statistics.fmean(len(x & y) / len(x | y) for x, y in pairs)
        assert found.mean[a, b] == found.mean[b, a] == pytest.approx(truth)
        assert found.n[a, b] == len(seeds)
    assert overlap.count_without_masks(each) == 1


def test_cached_statistics_count_what_they_cost(tmp_path):
    folder = trees.add_run(tmp_path, 0.5)
    for scoring, reused in (
        ({"seconds": 40.0, "samples": 10, "cached": True}, 40.0),
        ({"seconds": 40.0, "samples": 10, "cached": False}, None),
        ({"seconds": 0.0, "samples": 0, "cached": True}, None),  # needs no statistics
        (None, None),  # a dense run
    ):
        trees.change(folder / "results.json", "scoring", scoring)
        (run,) = load.load([tmp_path]).finished
        assert (run.reused, run.mask_seconds) == (reused, 2.5 + (reused or 0))


@pytest.mark.usefixtures("one_thread")
def test_a_real_run_is_reported(small, tmp_path, capsys):
    results = [train.run(replace(small, seed=s), quiet=True) for s in (0, 1)]
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "finished runs read: " in err
    values = [100 * result.best.accuracy for result in results]
    mean, std = statistics.fmean(values), statistics.stdev(values)
    assert f"{mean:.2f} ± {std:.2f} (2)" in out
    found = rows((tmp_path / "report" / "report.csv").read_text())
    for row, result in zip(found, results, strict=True):
        assert float(row["test_last_loss"]) == result.last.loss
        assert int(row["kept"]) == result.kept
        assert float(row["seconds_scoring"]) == result.seconds["scoring"]
    assert asdict(load.load([tmp_path]).finished[0].config) == asdict(small)
