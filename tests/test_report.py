import csv
import io
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import result_trees as trees
import torch

from fisherprune import report, train
from fisherprune.config import TrainConfig
from fisherprune.errors import FisherpruneError
from fisherprune.masks import Masks
from fisherprune.report import load, overlap, plain, settings, svg, tables, words
from fisherprune.report.__main__ import main
from fisherprune.report.published import TABLE_1, published_for

pytest.importorskip("matplotlib")
VOID = {"meta", "link", "br", "wbr", "hr", "img"}


class Page(HTMLParser):
    """Checks that elements are closed in order; gathers ids, links, tags and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.tags, self.texts = [], [], [], [], []
        self.loaded = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        target = attrs.get("href") or attrs.get("xlink:href") or attrs.get("src") or ""
        self.links += [target[1:]] if target.startswith("#") else []
        self.loaded += (
            [] if target.startswith(("#", "data:")) or not target else [target]
        )
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(" ".join(data.split()))


def rows(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def made(folder):
    """Return the report of a folder, nothing drawn."""
    return report.Report.of(load.load([folder]))


@pytest.fixture
def study(tmp_path):
    """Two methods, two sparsities; (snip, 0.98) has one seed; dense has two."""
    accuracies = {}
    numbers = torch.rand(100).tolist()
    for method, sparsity, seeds in (
        ("snip", 0.9, (0, 1, 2)),
        ("fts", 0.9, (0, 1, 2)),
        ("snip", 0.98, (1,)),
        ("none", 0.0, (0, 1)),
    ):
        for seed in seeds:
            best, last = numbers.pop(), numbers.pop()
            fields = {"method": method, "sparsity": sparsity, "seed": seed}
            trees.add_run(tmp_path, best, last, **fields)
            accuracies[method, sparsity, seed] = best, last
    return tmp_path, accuracies


def test_cells_are_means_and_sample_deviations(study):
    folder, accuracies = study
    cells = {
        (r["method"], float(r["sparsity"]), r["weights"]): r
        for r in rows(plain.summary_csv(made(folder)))
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
    found = rows(plain.runs_csv(made(folder)))
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
    labels = [each.label for each in made(tmp_path).groups]
    assert sorted(labels) == ["lr=0.1", "shuffle_masks, lr=0.2", "skip=bn, lr=0.2"]
    found = rows(plain.runs_csv(made(tmp_path)))
    assert {row["lr"] for row in found} == {"0.1", "0.2"}
    assert {row["shuffle_masks"] for row in found} == {"True", "False"}


def test_the_page_shows_what_the_tables_hold(study):
    folder, _ = study
    whole, output = report.write_report([folder])
    (each,) = whole.groups
    assert (each.methods, each.sparsities) == (("snip", "fts"), (0.9, 0.98))
    cell = each.cells["snip", 0.98]
    page = Page((output / "report.html").read_text())
    markdown = (output / "report.md").read_text()
    assert f"{cell.mean('best'):.2f}" in page.texts
    assert f"{cell.mean('best'):.2f} (1)" in markdown
    assert f"{cell.mean('last'):.2f} (1)" in markdown
    whole = words.cell_text(each.cells["fts", 0.9], "best")
    assert whole.endswith("(3)") and f"| {whole} |" in markdown
    assert "| - |" in markdown  # fts at 0.98 was not run
    assert any("partial" in text for text in page.texts)
    assert any("dense" in text for text in page.texts)


def test_html_is_one_well_formed_page_without_clashes(study):
    folder, _ = study
    trees.add_run(folder, 0.5, method="fts", shuffle_masks=True)  # a second group
    _, output = report.write_report([folder])
    text = (output / "report.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.links) <= set(page.ids)
    assert "script" not in page.tags and page.loaded == []
    assert page.tags.count("svg") == 10  # no overlap in the second group
    assert page.tags.count("caption") == page.tags.count("table") == 6
    assert page.tags.count("figcaption") == page.tags.count("figure") == 11
    assert text.count('role="img" aria-labelledby="') == 10


def test_equal_results_give_equal_bytes(study, tmp_path):
    folder, _ = study
    first, second = tmp_path / "a", tmp_path / "b"
    report.write_report([folder], first)
    report.write_report([folder], second)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert len(list(first.iterdir())) == 4


def test_dense_runs_stand_in_every_table_with_their_training(tmp_path):
    trees.add_run(tmp_path, 0.9, method="none", sparsity=0.0, seed=3)
    trees.add_run(tmp_path, 0.8, method="none", sparsity=0.0, lr=0.5)
    trees.add_run(tmp_path, 0.5, method="fts")
    trees.add_run(tmp_path, 0.4, method="fts", shuffle_masks=True)
    trees.add_run(tmp_path, 0.3, method="fts", warmup_epochs=1)
    groups = made(tmp_path).groups
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
    study = load.load([tmp_path, folder])  # and one given twice
    assert [run.config.seed for run in study.runs] == [1, 2]
    assert [x.text for x in study.repeated] == [f"repeats {study.runs[0].name}"]
    assert study.problems == []


def test_settings_in_words():
    config = TrainConfig(skip=("bias", "bn"), lr_drops=(), batch_size=512, lr=0.5)
    fields = settings.setting(config)
    assert settings.label(fields) == "skip=bias+bn, lr=0.5, lr_drops=none"
    assert settings.setting(TrainConfig(method="snip", seed=4)) == {}


def published_text():
    """Table 1 again, as its rows are printed."""
    return """
0.80 | 90.78 ± 0.08 | 91.10 ± 0.12 | 90.95 ± 0.35 | 90.74 ± 0.10 | 87.18 ± 0.51 | \
90.95 ± 0.11 | 91.08 ± 0.06 | 90.94 ± 0.22 | 90.73 ± 0.33
0.90 | 89.35 ± 0.13 | 89.88 ± 0.28 | 90.39 ± 0.23 | 90.36 ± 0.34 | 86.60 ± 0.51 | \
90.04 ± 0.21 | 90.20 ± 0.08 | 90.55 ± 0.23 | 89.22 ± 0.30
0.95 | 87.59 ± 0.11 | 89.23 ± 0.19 | 89.00 ± 0.05 | 89.31 ± 0.17 | 86.50 ± 0.05 | \
88.61 ± 0.28 | 89.50 ± 0.18 | 89.47 ± 0.32 | 87.58 ± 0.25
0.98 | 83.47 ± 0.20 | 85.70 ± 0.33 | 86.43 ± 0.05 | 87.26 ± 0.28 | 85.99 ± 0.08 | \
85.61 ± 0.20 | 86.97 ± 0.22 | 87.24 ± 0.32 | 83.40 ± 0.74
0.99 | 78.28 ± 0.45 | 71.99 ± 0.28 | 83.47 ± 0.15 | 84.54 ± 0.04 | 84.56 ± 0.46 | \
82.13 ± 0.28 | 83.74 ± 0.48 | 84.85 ± 0.18 | 77.60 ± 1.02
"""


def test_published_numbers_are_those_of_table_1():
    lines = published_text().strip().splitlines()
    expected = {}
    for line in lines:
        sparsity, *cells = line.split(" | ")
        for method, cell in zip(trees.PUBLISHED_METHODS, cells, strict=True):
            mean, std = cell.split(" ± ")
            expected[method, float(sparsity)] = float(mean), float(std)
    assert TABLE_1.cells == expected and len(expected) == 45


def test_published_numbers_stand_beside_equal_settings_only():
    same = TrainConfig()
    assert published_for(same) is TABLE_1
    for fields in (
        {"amp": True},
        {"compile": True, "memory_format": "channels_last"},
        {"skip": ("bias", "linear", "bn")},
        {"dataset": "folder", "data_dir": "data/cifar10-jpeg"},
        {"dataset": "folder", "data_dir": "/x/CIFAR-10/images"},
    ):
        assert published_for(replace(same, **fields)) is TABLE_1, fields
    for fields in (
        {"epochs": 159},
        {"warmup_epochs": 1},
        {"group_size": 2},
        {"train_samples": 1000},
        {"model": "vgg19"},
        {"dataset": "cifar100"},
        {"skip": ("bias",)},
        {"shuffle_masks": True},
        {"dataset": "folder", "data_dir": "data/cifar100"},
        {"dataset": "folder", "data_dir": "data/flowers"},
    ):
        assert published_for(replace(same, **fields)) is None, fields


def test_differences_to_published_numbers(tmp_path):
    trees.add_run(tmp_path, 0.8774, method="fts", sparsity=0.98, seed=0)
    trees.add_run(tmp_path, 0.8694, method="fts", sparsity=0.98, seed=1)
    trees.add_run(tmp_path, 0.85, method="grasp_reversed", sparsity=0.98)
    trees.add_run(tmp_path, 0.84, method="grasp", sparsity=0.98)
    trees.add_run(tmp_path, 0.84, method="fts", sparsity=0.97)
    whole = made(tmp_path)
    (each,) = whole.groups
    assert each.difference("fts", 0.98, "best") == pytest.approx(87.34 - 87.24)
    assert each.difference("grasp_reversed", 0.98, "best") == pytest.approx(-0.99)
    assert each.difference("grasp", 0.98, "best") is None
    assert each.difference("fts", 0.97, "best") is None
    markdown = plain.markdown(whole)
    assert "| published |  | 85.99 ± 0.08 | 87.24 ± 0.32 |" in markdown
    assert "| difference |  | -0.99 | +0.10 |" in markdown
    assert "The published GraSP column stands beside our grasp\\_reversed" in markdown


def test_folder_images_are_said_to_be_files(tmp_path):
    fields = {"dataset": "folder", "data_dir": "/x/cifar10-jpeg", "sparsity": 0.9}
    trees.add_run(tmp_path, 0.9, **fields)
    whole = made(tmp_path)
    (each,) = whole.groups
    assert each.published is TABLE_1 and each.dataset == "folder cifar10-jpeg"
    assert "JPEGs" in plain.markdown(whole) and "/x/" not in plain.markdown(whole)


def test_the_highest_mean_is_marked_and_ties_are_shared(tmp_path):
    for method, accuracy in (("snip", 0.9), ("fts", 0.9), ("random", 0.8)):
        trees.add_run(tmp_path, accuracy, method=method)
    trees.add_run(tmp_path, 0.7, method="snip", sparsity=0.5)
    (each,) = tables.group(load.load([tmp_path]).runs)
    assert each.highest(0.9, "best") == {"snip", "fts"}
    assert each.highest(0.5, "best") == set()  # nothing to be higher than


def test_jaccard_is_the_mean_over_common_seeds(tmp_path):
    folders = {
        (method, seed): trees.add_run(tmp_path, 0.5, method=method, seed=seed)
        for method in ("snip", "fts", "random")
        for seed in (0, 1)
    }
    (folders["random", 1] / overlap.MASKS).unlink()
    (each,) = tables.group(load.load([tmp_path]).runs)
    (found,) = overlap.overlaps(each, [], lambda text: None)

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
    assert overlap.without_masks(each) == 1


def test_missing_masks_and_curves_are_said(tmp_path):
    for method in ("snip", "fts"):
        folder = trees.add_run(tmp_path, 0.5, method=method, masks=False)
        (folder / "metrics.csv").unlink()
    _, output = report.write_report([tmp_path])
    text = (output / "report.html").read_text()
    assert "No overlap of masks: 2 of 2 runs have no masks.safetensors" in text
    assert "No training curves" in text


def test_collapsed_layers_are_named(tmp_path):
    layers = {"conv1.weight": (0, 27), "layer1.0.conv1.weight": (3, 288)}
    trees.add_run(tmp_path, 0.1, layers=layers, method="magnitude", sparsity=0.99)
    _, output = report.write_report([tmp_path])
    text = (output / "report.html").read_text()
    assert "Layers have collapsed in (number of runs): magnitude at 0.99 (1)." in text
    assert "magnitude at 0.99: conv1.weight (seed 0)" in text
    assert (
        rows((output / "report.csv").read_bytes().decode())[0]["collapsed_layers"]
        == "1"
    )


def test_cached_statistics_count_what_they_cost(tmp_path):
    folder = trees.add_run(tmp_path, 0.5)
    content = json.loads((folder / "results.json").read_text())
    content["scoring"] = {"seconds": 40.0, "samples": 10, "cached": True}
    trees.write(folder / "results.json", content)
    (run,) = load.load([tmp_path]).runs
    assert (run.reused, run.mask_seconds) == (40.0, 42.5)
    for scoring in (
        {"seconds": 40.0, "samples": 10, "cached": False},
        {"seconds": 0.0, "samples": 0, "cached": True},  # needs no statistics
        None,  # a dense run
    ):
        trees.write(folder / "results.json", content | {"scoring": scoring})
        (run,) = load.load([tmp_path]).runs
        assert (run.reused, run.mask_seconds) == (None, 2.5)


def test_failed_and_unfinished_runs_are_listed(study, capsys):
    folder, _ = study
    trees.add_failed(folder, "the loss <b>must</b>\nstay finite", method="fbss")
    trees.add_unfinished(folder, method="grasp")
    assert main([str(folder), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "runs: 9 finished, 1 failed, 1 unfinished" in out and err == ""
    text = (folder / "report" / "report.html").read_text()
    assert "the loss &lt;b&gt;must&lt;/b&gt; stay finite" in text
    markdown = (folder / "report" / "report.md").read_text()
    assert "the loss \\<b\\>must\\</b\\> stay finite" in markdown


def test_nothing_finished_is_a_report_too(tmp_path, capsys):
    trees.add_unfinished(tmp_path)
    assert main([str(tmp_path), "--quiet"]) == 0
    assert "runs: 0 finished, 1 unfinished" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.csv").read_text() == ""


def broken(change):
    """Return a function that writes results.json with a change to its content."""

    def write(path):
        content = trees.result(TrainConfig(), 0.5)
        change(content)
        trees.write(path, content)

    return write


BROKEN = {
    "is no JSON: truncated": lambda p: p.write_text(p.read_text()[:400]),
    "is no JSON": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    "must be a JSON object, got [1]": lambda p: p.write_text("[1]"),
    "format must be 1, got None": lambda p: p.write_text('{"a": 1}'),
    "format must be 1, got 2": broken(lambda c: c.update(format=2)),
    "format must be 1, got True": broken(lambda c: c.update(format=True)),
    "test.last is missing": broken(lambda c: c["test"].pop("last")),
    "test.best.accuracy must be a number in [0, 1], got 50": broken(
        lambda c: c["test"]["best"].update(accuracy=50)
    ),
    "config.speed is no field": broken(lambda c: c["config"].update(speed=1)),
    "config.sparsity must be float, got '0.9'": broken(
        lambda c: c["config"].update(sparsity="0.9")
    ),
    "config: method must be one of": broken(lambda c: c["config"].update(method="x")),
    "config: lr_drops": broken(lambda c: c["config"].update(lr_drops=[3, 2])),
    "layers.conv1.weight must keep from 0 to all": broken(
        lambda c: c["layers"]["conv1.weight"].update(kept=10**6)
    ),
    "seconds.data must be a finite number": broken(
        lambda c: c["seconds"].update(data=float("nan"))
    ),
    "warnings must be a list, got 'x'": broken(lambda c: c.update(warnings="x")),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_results(message, tmp_path, capsys):
    good = trees.add_run(tmp_path, 0.5, seed=0)
    bad = trees.add_run(tmp_path, 0.5, seed=1)
    BROKEN[message](bad / "results.json")
    for alone in (bad, bad / "results.json"):
        with pytest.raises(FisherpruneError) as raised:
            load.load([alone])
        assert str(raised.value).startswith(f"{bad / 'results.json'}")
        assert message in str(raised.value)
    study = load.load([tmp_path])
    assert [run.folder for run in study.runs] == [good]
    (problem,) = study.problems
    assert problem.name == f"runs/{bad.name}" and message in problem.text
    assert str(tmp_path) not in problem.text


def test_a_broken_file_alone_and_among_others(tmp_path, capsys):
    trees.add_run(tmp_path, 0.5, seed=0)
    bad = trees.add_run(tmp_path, 0.5, seed=1)
    (bad / "results.json").write_text("{")
    assert main([str(bad), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"fisherprune.report: error: {bad / 'results.json'} is no")
    assert out == "" and err.count("\n") == 1 and not (bad / "report").exists()
    assert main([str(tmp_path), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "1 finished, 1 broken files" in out
    assert f"broken: runs/{bad.name}: results.json is no JSON" in err
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert any(bad.name in text and "is no JSON" in text for text in page.texts)


def test_broken_files_beside_a_result(tmp_path, capsys):
    folders = [trees.add_run(tmp_path, 0.5, seed=s, method="fts") for s in (0, 1, 2)]
    for seed in (0, 1, 2):
        trees.add_run(tmp_path, 0.5, seed=seed, method="snip")
    (folders[0] / "metrics.csv").write_text("phase,epoch,train_loss\ntrain,1\n")
    (folders[1] / overlap.MASKS).write_bytes(b"nothing")
    shapes = Masks({"conv1.weight": torch.ones(3, dtype=torch.bool)})
    shapes.save(folders[2] / overlap.MASKS)
    failed = trees.add_failed(tmp_path, "x", method="random")
    (failed / "error.json").write_text("{}")
    unfinished = trees.add_unfinished(tmp_path, method="random", seed=5)
    (unfinished / "config.json").write_text('{"sparsity": "much"}')
    assert main([str(tmp_path), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "6 finished, 5 broken files" in out
    for part in (
        "metrics.csv is no table of epochs",
        "masks.safetensors' can't be read",
        "masks must be of the same parameters",
        "error.json: error is missing",
        "config.json: sparsity must be float, got 'much'",
    ):
        assert part in err


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "no runs in "),
        (lambda p: (p / "x.json").write_text("{}"), "no runs in "),
        (lambda p: (p / load.MARKER).write_text('{"format": 2}'), "format must be 1"),
        (lambda p: (p / load.MARKER).write_text("{"), f"{load.MARKER} is no JSON"),
    ],
)
def test_nothing_to_report(make, message, tmp_path, capsys):
    make(tmp_path)
    assert main([str(tmp_path), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert message in err and str(tmp_path) in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/nowhere"], "results must be a folder that exists, got /nowhere"),
        (["/dev/null"], "results must be a folder or a results.json, got /dev/null"),
        ([], "the following arguments are required: RESULTS"),
        (["RESULTS", "--output", "/dev/null/x"], "output must be a folder that can be"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, capsys):
    trees.add_run(tmp_path, 0.5)
    given = [str(tmp_path) if a == "RESULTS" else a for a in arguments]
    assert main([*given, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fisherprune.report: error: ") and message in err
    assert out == "" and err.count("\n") == 1


def test_matplotlib_is_asked_for_by_name(tmp_path, monkeypatch, capsys):
    trees.add_run(tmp_path, 0.5)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(tmp_path), "--quiet"]) == 2
    assert 'python -m pip install "fisherprune[report]"' in capsys.readouterr().err


def test_texts_are_escaped(tmp_path):
    hostile = '<script>alert("1")</script> | *x* `y`, "z"\n'
    folder = trees.add_run(tmp_path, 0.5)
    content = json.loads((folder / "results.json").read_text())
    content["environment"]["device"] = hostile
    content["layers"]["</svg><b>&"] = {"kept": 1, "total": 2}
    trees.write(folder / "results.json", content)
    _, output = report.write_report([tmp_path])
    page = Page((output / "report.html").read_text())
    assert not {"script", "b"} & set(page.tags)
    assert rows((output / "report.csv").read_bytes().decode())[0]["device"] == hostile
    line = next(
        x for x in (output / "report.md").read_text().splitlines() if "dev" in x
    )
    assert line == (
        '- devices: \\<script\\>alert("1")\\</script\\> \\| \\*x\\* \\`y\\`, "z"'
    )


def test_svg_keeps_texts_and_prefixes_ids():
    def paint(figure):
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1])
        ax.set_title("0.123456")

    text = svg.draw("a", "T & t", "alt", 2, paint)
    assert ">0.123456<" in text and '<title id="a-name">T &amp; t</title>' in text
    page = Page(text)
    assert all(name.startswith("a-") for name in [*page.ids, *page.links])


def test_a_real_run_is_reported(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny layers: threads only wait for each other
    config = TrainConfig(
        model="resnet20",
        dataset="digits",
        train_samples=65,
        score_samples=20,
        epochs=1,
        device="cpu",
        output_dir=str(tmp_path / "runs"),
    )
    results = [train.run(replace(config, seed=s), quiet=True) for s in (0, 1)]
    torch.set_num_threads(before)
    command = [sys.executable, "-m", "fisherprune.report", str(tmp_path)]
    source = Path(report.__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source)
    assert done.returncode == 0 and "reading results" in done.stderr
    values = [100 * result.best.accuracy for result in results]
    mean, std = statistics.fmean(values), statistics.stdev(values)
    assert f"{mean:.2f} ± {std:.2f} (2)" in done.stdout
    found = rows((tmp_path / "report" / "report.csv").read_text())
    for row, made in zip(found, results, strict=True):
        assert float(row["test_last_loss"]) == made.last.loss
        assert int(row["kept"]) == made.kept
        assert float(row["seconds_scoring"]) == made.seconds["scoring"]
    assert asdict(load.load([tmp_path]).runs[0].config) == asdict(config)
