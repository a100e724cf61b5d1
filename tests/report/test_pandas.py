"""Results read with pandas in two lines, of a run and of a study; as the docs say."""

import math

import pytest
import result_trees as trees
from result_trees import made

from fisherprune.report.pages.csv_files import runs_csv

pd = pytest.importorskip("pandas")

ONE_RUN = """
epochs = pd.read_csv(f"{run}/metrics.csv")
result = pd.read_json(f"{run}/results.json", typ="series")
"""
LAYERS = """
layers = pd.DataFrame(result["layers"]).T
"""
A_STUDY = """
runs = pd.read_csv(f"{study}/report/report.csv")
means = runs.groupby(["method", "sparsity"]).test_best_accuracy.agg(["mean", "std"])
"""
ALL_EPOCHS = """
files = {f.parent.name: f for f in Path(study).rglob("metrics.csv")}
epochs = pd.concat({run: pd.read_csv(f) for run, f in files.items()}, names=["run"])
"""


def found(snippet, **names):
    """Return the names after the lines."""
    exec(f"import pandas as pd\nfrom pathlib import Path\n{snippet}", names)
    return names


def test_a_run(study):
    root, accuracies = study
    folder = next((root / "runs").glob("*-fts-0.9-seed1-*"))
    names = found(ONE_RUN + LAYERS, run=folder)
    epochs, result, layers = names["epochs"], names["result"], names["layers"]
    assert [*epochs.epoch] == [1, 2, 3] and epochs.phase.eq("train").all()
    assert epochs.train_loss.dtype == epochs.validation_accuracy.dtype == "float64"
    assert [*epochs.validation_loss.isna()] == [False, True, False]
    best, last = accuracies["fts", 0.9, 1]
    tested = [result["test"][weights]["accuracy"] for weights in ("best", "last")]
    assert tested == pytest.approx([best, last])
    assert result["config"]["method"] == "fts" and result["config"]["seed"] == 1
    assert dict(layers.total) == trees.LAYERS and layers.kept.sum() == result["kept"]


def test_a_study(study):
    root, accuracies = study
    (root / "report").mkdir()
    (root / "report" / "report.csv").write_text(runs_csv(made(root)))
    names = found(A_STUDY, study=root)
    runs, means = names["runs"], names["means"]
    by_run = runs.set_index(["method", "sparsity", "seed"])  # none is a name, not NaN
    assert {*by_run.index} == {*accuracies}
    for run, tested in accuracies.items():
        columns = ["test_best_accuracy", "test_last_accuracy"]
        assert [*by_run.loc[run, columns]] == pytest.approx([*tested])
    assert runs[["kept", "effective", "seconds_training"]].dtypes.ne("object").all()
    assert means.loc["fts", 0.9]["mean"] == pytest.approx(
        sum(accuracies["fts", 0.9, seed][0] for seed in range(3)) / 3
    )
    assert math.isnan(means.loc["snip", 0.98]["std"])  # one seed
    epochs = found(ALL_EPOCHS, study=root)["epochs"]
    assert len(epochs) == 3 * len(accuracies)
    assert {*epochs.index.get_level_values("run")} == {*runs.folder.str[5:]}  # runs/
