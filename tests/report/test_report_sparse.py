"""What the report says of training without the pruned weights."""

import random

import pytest
import result_trees as trees
from html_page import Page
from result_trees import made, rows

from fisherprune import report
from fisherprune.report.pages.csv_files import runs_csv

pytest.importorskip("matplotlib")


def execution(**changed):
    """Return what results.json says of a sparse run."""
    return {
        "sparse_layers": 3,
        "expected": 2.5,
        "dense_step": random.uniform(1, 2),
        "sparse_step": random.uniform(0.1, 0.5),
        "weights": 1_500_000,
        "dense_weights": 60_000_000,
        "optimizer": 1_500_000,
        "dense_optimizer": 60_000_000,
    } | changed


def test_means_of_what_sparse_runs_saved(tmp_path):
    several = [execution(), execution(), None, execution(dense_step=None)]
    for seed, each in enumerate(several):
        folder = trees.add_run(tmp_path, 0.5, masks=False, method="snip", seed=seed)
        trees.change(folder / "results.json", "execution", each)
    trees.add_run(tmp_path, 0.5, masks=False, method="fts")
    _, output = report.write_report([tmp_path])
    dense = sum(1e3 * each["dense_step"] for each in several[:2]) / 2
    known = [each for each in several if each]
    sparse = sum(1e3 * each["sparse_step"] for each in known) / 3
    texts = Page((output / "report.html").read_text()).texts
    headings = ("step, dense, ms", "step, sparse, ms", "weights, sparse, MB")
    assert {*headings, f"{dense:.3g}", f"{sparse:.3g}", "1.5", "60"} <= set(texts)
    markdown = (output / "report.md").read_text()
    assert f"| {dense:.3g} | {sparse:.3g} | 60 | 1.5 | 60 | 1.5 |" in markdown
    found = {(r["method"], r["seed"]): r for r in rows(runs_csv(made(tmp_path)))}
    first = found["snip", "0"]
    assert float(first["execution_dense_step"]) == several[0]["dense_step"]
    assert first["execution_weights"] == "1500000"
    assert found["snip", "2"]["execution_weights"] == ""


def test_dense_runs_say_nothing_of_it(tmp_path):
    trees.add_run(tmp_path, 0.5, masks=False, method="snip")
    _, output = report.write_report([tmp_path])
    assert "step, dense" not in (output / "report.md").read_text()


@pytest.mark.parametrize(
    "key, value", [("weights", -1), ("expected", "2"), ("optimizer", [])]
)
def test_what_is_no_such_record_is_refused(key, value, tmp_path):
    folder = trees.add_run(tmp_path, 0.5, masks=False, method="snip")
    trees.change(folder / "results.json", "execution", execution(**{key: value}))
    _, output = report.write_report([tmp_path])
    page = (output / "report.md").read_text()
    assert f"execution.{key} must be" in page
