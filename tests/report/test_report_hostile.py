"""Names and files that would break a page: they are shown, or one run is left out."""

import json
import os

import pytest
import result_trees as trees
from html_page import Page
from result_trees import made, rows

from fisherprune import report
from fisherprune.report import load
from fisherprune.report.__main__ import main
from fisherprune.report.pages.csv_files import runs_csv
from fisherprune.report.printable import one_line, printable

pytest.importorskip("matplotlib")
HOSTILE = {
    "mathematics": ("a$x_^$b", "a$x_^$b"),
    "no UTF-8": (os.fsdecode(b"caf\xe9"), "caf\\udce9"),
    "escapes": ("\x1b[31mred\x07\u202e", "\\x1b[31mred\\x07\\u202e"),
    "markup": ("<b>&amp;{{ 7 * 7 }}", "<b>&amp;{{ 7 * 7 }}"),
}


def change(folder, **fields):
    """Change fields of a run's result."""
    path = folder / "results.json"
    trees.write(path, json.loads(path.read_text()) | fields)


def test_printable_shows_what_can_not_be_seen():
    assert printable("é $ \u65e5 a\tb\n") == "é $ \u65e5 a\tb\n"
    assert printable("\x00\x1b\x9b\r\ud800\u2028") == "\\x00\\x1b\\x9b\\r\\ud800\\u2028"
    assert printable(None) == "None"
    assert one_line(" a\n\tb\x1b ") == "a b\\x1b"


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_of_folders_are_shown_as_they_are(kind, tmp_path, capsys):
    """In the folder of the results, of a run, of the images, and in every text."""
    name, shown = HOSTILE[kind]
    root = tmp_path / name
    for seed in (0, 1):  # two devices: they are titles in a figure
        folder = trees.add_run(
            root, 0.5, seed=seed, dataset="folder", data_dir=f"/x/{name}", masks=False
        )
        change(
            folder,
            environment={"device": f"{name} {seed}", name: name},
            layers={name: {"kept": 1, "total": 2}},
            seconds={"training": 1.0, name: 2.0},
            warnings=[f"note {name}"],
        )
    trees.add_run(root, 0.5, dataset="folder", data_dir=f"/x/{name}", lr=1, masks=False)
    folder.rename(folder.with_name(f"run {name}"))
    trees.add_failed(root, name, method="snip")
    assert main([str(root)]) == 0
    out, err = capsys.readouterr()
    assert f"folder {shown}, resnet18" in out and f"{shown}/report" in out
    texts = {p.name: p.read_bytes().decode() for p in (root / "report").iterdir()}
    page = Page(texts["report.html"])
    assert any(f"{shown} 0, {shown} 1" in text for text in page.texts)
    assert f"training, {shown} 1" in page.texts
    assert any(f"runs/run {shown}: note {shown}" == text for text in page.texts)
    assert f"Settings compared: folder {shown}, resnet18" in page.texts
    found = rows(texts["report.csv"])
    assert found[0][f"seconds_{shown}"] == "2.0" and found[0][shown] == shown
    for text in (out, err, *texts.values()):
        assert all(c.isprintable() or c in "\n\t" for c in text)


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@SUM(A1)", " =1"])
def test_cells_are_no_formulas(text, tmp_path):
    folder = trees.add_run(tmp_path, 0.5)
    change(folder, environment={"device": text, text: "-1.5"}, best_epoch=3)
    (row,) = rows(runs_csv(made(tmp_path)))
    assert row["device"] == f"'{text}" and f"'{text}" in row
    assert row[f"'{text}"] == "'-1.5"  # a text: only numbers are numbers
    change(folder, seconds={"data": -1.5})
    (row,) = rows(runs_csv(made(tmp_path)))
    assert row["seconds_data"] == "-1.5"


def test_links_are_followed_and_every_run_counts_once(tmp_path):
    elsewhere, results = tmp_path / "elsewhere", tmp_path / "results"
    trees.add_run(elsewhere, 0.5, seed=1)
    results.mkdir()
    (results / "runs").symlink_to(elsewhere / "runs")
    assert [run.config.seed for run in load.load([results]).finished] == [1]
    (results / "a").symlink_to(elsewhere)
    (results / "round").symlink_to(results)
    folder = trees.add_run(results / "own", 0.5, seed=2)
    (results / "0").symlink_to(folder)
    found = load.load([results, elsewhere])
    assert sorted(run.config.seed for run in found.finished) == [1, 2]
    assert (found.repeated, found.problems) == ([], [])
    names = [run.name for run in found.finished]
    assert f"results/own/runs/{folder.name}" in names  # not by the link


DAMAGED = {
    "results.json: is no JSON": ("results.json", '{"a": ' + "[" * 10**5),
    "results.json: format must be 1": ("results.json", '{"a": 1}'),
    "metrics.csv is no table of epochs": ("metrics.csv", "x" * 200_000),
    "masks.safetensors' can't be read": ("masks.safetensors", "x" * 100),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_file_is_the_trouble_of_its_run(message, tmp_path, capsys):
    for seed in (0, 1):
        trees.add_run(tmp_path, 0.5, seed=seed)
        bad = trees.add_run(tmp_path, 0.5, method="snip", seed=seed)
    name, text = DAMAGED[message]
    (bad / name).write_text(text)
    assert main([str(tmp_path), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert f"broken: runs/{bad.name}: " in err and message in err
    assert err.count("\n") == 1 and len(err) < 500 and "1 broken files" in out
    assert "50.00 ± 0.00 (2)" in out


def test_a_seed_of_thousands_of_digits(tmp_path, capsys):
    trees.add_run(tmp_path, 0.5)
    bad = trees.add_run(tmp_path, 0.5, seed=1)
    text = (bad / "results.json").read_text()
    for digits, code in ((5000, 1), (100, 0)):
        changed = text.replace('"seed": 1', f'"seed": {"9" * digits}')
        (bad / "results.json").write_text(changed)
        assert main([str(tmp_path), "--quiet"]) == code
        err = capsys.readouterr().err
        assert err.count("\n") == code and len(err) < 500


def test_equal_places_of_figures_are_refused():
    from fisherprune.report.figures.registry import register

    figures = {}
    register(figures, place=1)(len)
    with pytest.raises(ValueError, match="place must be free, got 1"):
        register(figures, place=1)(max)


def test_an_output_folder_may_have_any_name(tmp_path, capsys):
    trees.add_run(tmp_path, 0.5)
    report.write_report([tmp_path], tmp_path / "$x$\x1b")
    assert (tmp_path / "$x$\x1b" / "report.html").exists()
