"""What the report says of effective sparsity, FLOPs and weights that lead nowhere."""

import json
import statistics

import pytest
import result_trees as trees
from html_page import Page
from result_trees import made, rows

from fisherprune import report
from fisherprune.report.figures.density import density
from fisherprune.report.figures.effective import effective
from fisherprune.report.pages.content import Left, left_rows
from fisherprune.report.pages.csv_files import runs_csv, summary_csv

pytest.importorskip("matplotlib")
LEFT = "What the masks leave"


def with_left(root, kept, effective, masked=400, **fields):
    """Add a run of one layer of 1,000 weights."""
    layers = {"fc.weight": (kept, 1000)}
    folder = trees.add_run(root, 0.5, layers=layers, masks=False, **fields)
    trees.change(folder / "results.json", "layers/fc.weight/effective", effective)
    flops = masked if masked is None else {"dense": 1000, "masked": masked}
    trees.change(folder / "results.json", "flops", flops)
    return folder


def forget(root):
    """Make the results of a folder those of an older version."""
    for path in root.rglob("results.json"):
        content = json.loads(path.read_text())
        del content["flops"]
        for layer in content["layers"].values():
            del layer["effective"]
        trees.write(path, content)


def figure(make, folder):
    (table,) = made(folder).tables
    return make(table)


def test_means_over_seeds_are_in_every_form(tmp_path):
    for seed, effective_, masked in ((0, 90, 123), (1, 70, 456)):
        with_left(tmp_path, 100, effective_, masked, method="snip", seed=seed)
    with_left(tmp_path, 20, 20, 10, method="fts", sparsity=0.98)
    (table,) = made(tmp_path).tables
    sparsity, share = statistics.fmean([0.91, 0.93]), statistics.fmean([0.123, 0.456])
    assert left_rows(table) == {
        "0.9": [Left(f"{sparsity:.4f}", f"{100 * share:.2f} %"), Left()],
        "0.98": [Left(), Left("0.9800", "1.00 %")],
    }
    _, output = report.write_report([tmp_path])
    page = Page((output / "report.html").read_text())
    assert LEFT in page.texts and {"0.9200", "FLOPs 28.95 %"} <= set(page.texts)
    markdown = (output / "report.md").read_text()
    assert f"### {LEFT}" in markdown and "| 0.9 | 0.9200, 28.95 % | - |" in markdown
    cells = {(r["method"], r["sparsity"]): r for r in rows(summary_csv(made(tmp_path)))}
    found = cells["snip", "0.9"]
    assert float(found["effective_sparsity"]) == pytest.approx(sparsity)
    assert float(found["flops_share"]) == pytest.approx(share)
    one = next(r for r in rows(runs_csv(made(tmp_path))) if r["seed"] == "1")
    assert (one["effective"], one["flops_masked"], one["flops_dense"]) == (
        *("70", "456", "1000"),
    )
    assert float(one["effective_sparsity"]) == 0.93


def test_results_of_older_versions_leave_it_out(study):
    folder, _ = study
    forget(folder)
    _, output = report.write_report([folder])
    for name in ("report.html", "report.md"):
        assert LEFT not in (output / name).read_text()
    assert {row["effective_sparsity"] for row in rows(runs_csv(made(folder)))} == {""}
    assert {row["flops_share"] for row in rows(summary_csv(made(folder)))} == {""}
    assert figure(effective, folder) is None
    assert "white dot" not in figure(density, folder).caption


def test_a_cell_with_an_older_run_has_no_mean(tmp_path):
    with_left(tmp_path, 100, 90, seed=0)
    with_left(tmp_path, 100, None, masked=None, seed=1)
    with_left(tmp_path, 100, 90, masked=None, method="snip")
    (table,) = made(tmp_path).tables
    assert left_rows(table) == {"0.9": [Left("0.9100", "-"), Left()]}


def test_sparsities_read_1_only_where_nothing_is_left(tmp_path):
    layers = {"fc.weight": (2, 100_000)}
    for method, paths in (("snip", 1), ("fts", 0)):
        folder = trees.add_run(tmp_path, 0.1, layers=layers, masks=False, method=method)
        trees.change(folder / "results.json", "layers/fc.weight/effective", paths)
    (table,) = made(tmp_path).tables
    found = [left.effective_sparsity for left in left_rows(table)["0.9"]]
    assert found == ["> 0.9999", "1.0000"]


def test_networks_without_a_path_are_counted(tmp_path):
    with_left(tmp_path, 100, 0, method="magnitude", seed=0)
    with_left(tmp_path, 100, 50, method="magnitude", seed=1)
    _, output = report.write_report([tmp_path])
    text = "Runs without a path of kept weights from an input to an output: 1 of mag"
    assert text in (output / "report.html").read_text()


def test_layers_whose_weights_lead_nowhere_are_marked(tmp_path):
    with_left(tmp_path / "a", 100, 50)
    with_left(tmp_path / "b", 100, 49)
    with_left(tmp_path / "c", 0, 0)
    dotted = ["white dot" in figure(density, tmp_path / x).caption for x in "abc"]
    assert dotted == [False, True, False]


def test_accuracy_over_effective_sparsity_where_it_is_another(tmp_path):
    with_left(tmp_path, 100, 95, method="snip")
    with_left(tmp_path, 1000, 1000, method="snip", sparsity=0.0)
    assert figure(effective, tmp_path) is None  # nearly the same
    with_left(tmp_path, 100, 80, method="fts")
    with_left(tmp_path, 10, 0, method="fts", sparsity=0.99)
    drawn = figure(effective, tmp_path)
    assert drawn.alt == "fts at 0.9: 0.9200; snip at 0: 0.0000; snip at 0.9: 0.9050"
    assert "Not shown: 1 of 4 cells" in drawn.caption
    _, output = report.write_report([tmp_path])
    page = Page((output / "report.html").read_text())
    assert "g1-effective" in page.ids
