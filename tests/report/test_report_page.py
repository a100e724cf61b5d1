"""What the page of the report shows, as HTML."""

import re

import pytest
import result_trees as trees
from html_page import Page
from result_trees import rows

from fisherprune import report
from fisherprune.report.__main__ import main
from fisherprune.report.figures import COMPARISONS, TABLE_FIGURES, svg
from fisherprune.report.figures.registry import Figure
from fisherprune.report.pages import content
from fisherprune.scoring.criteria import criteria, get_criterion

pytest.importorskip("matplotlib")


def test_the_page_shows_what_the_tables_hold(study):
    folder, _ = study
    whole, output = report.write_report([folder])
    (each,) = whole.tables
    assert (each.methods, each.sparsities) == (("snip", "fts"), (0.9, 0.98))
    cell = each.cells["snip", 0.98]
    page = Page((output / "report.html").read_text())
    markdown = (output / "report.md").read_text()
    assert f"{cell.mean('best'):.2f}" in page.texts
    assert f"{cell.mean('best'):.2f} (1)" in markdown
    assert f"{cell.mean('last'):.2f} (1)" in markdown
    rows = content.texts_of(each, content.accuracy_rows(each, "best"))
    text = rows[1][each.methods.index("fts") + 1]
    assert text.endswith("(3)") and f"| {text} |" in markdown
    assert "| - |" in markdown  # fts at 0.98 was not run
    assert any("partial" in text for text in page.texts)
    assert any("dense" in text for text in page.texts)


def test_every_letter_of_the_formulas_is_explained_on_both_pages(study):
    folder, _ = study
    _, output = report.write_report([folder])
    summaries = [get_criterion(code).summary for code in criteria()]
    formulas = " ".join(x for s in summaries for x in s.split("``")[1::2])
    letters = {*re.findall("[A-Za-z]+", formulas)} - {"sqrt"}
    assert {"w", "m", "F", "H", "Hm", "g"} <= letters
    for name in ("report.html", "report.md"):
        text = (output / name).read_text()
        assert all(re.search(rf"\b{letter}: ", text) for letter in letters), name


def test_html_is_one_well_formed_page_without_clashes(study):
    folder, _ = study
    trees.add_run(folder, 0.5, method="fts", shuffle_masks=True)  # a second group
    _, output = report.write_report([folder])
    text = (output / "report.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.links) <= set(page.ids)
    assert "script" not in page.tags and page.loaded == []
    figures = 2 * len(TABLE_FIGURES) + len(COMPARISONS)
    assert page.tags.count("svg") == figures - 1  # no overlap in the second table
    assert page.tags.count("caption") == page.tags.count("table") == 8
    assert page.tags.count("figcaption") == page.tags.count("figure") == figures
    assert text.count('role="img" aria-labelledby="') == figures - 1


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
    assert "Runs with collapsed layers: 1 of magnitude at sparsity 0.99." in text
    assert "magnitude at 0.99: conv1.weight (seed 0)" in text
    (row,) = rows((output / "report.csv").read_text())
    assert row["collapsed_layers"] == "1"


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


def test_texts_are_escaped(tmp_path):
    hostile = '<script>alert("1")</script> | *x* `y`, "z"\n'
    folder = trees.add_run(tmp_path, 0.5)
    trees.change(folder / "results.json", "environment/device", hostile)
    layers = {"</svg><b>&": {"kept": 1, "total": 2}}
    trees.change(folder / "results.json", "layers", layers)
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
    def paint(canvas):
        ax = canvas.subplots()
        ax.plot([0, 1], [0, 1])
        ax.set_title("0.123456")

    drawn = svg.draw(Figure("T", "caption", "alt", 2, paint), "a", "T: x")
    assert ">0.123456<" in drawn.svg and drawn.view_box == "0 0 792 144"
    page = Page(drawn.svg)
    assert all(name.startswith("a-") for name in [*page.ids, *page.links])
