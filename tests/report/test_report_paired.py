"""Which methods the report says differ by more than seeds do."""

import csv
import math
import statistics

import pytest
import result_trees as trees
from result_trees import made
from scipy.stats import ttest_rel

from fisherprune import report
from fisherprune.report.paired import pairs_of

pytest.importorskip("matplotlib")


def study(root, accuracies, sparsity=0.9):
    """Add runs; ``accuracies`` has shares by method and seed."""
    for method, by_seed in accuracies.items():
        for seed, share in by_seed.items():
            config = {"method": method, "seed": seed, "sparsity": sparsity}
            trees.add_run(root, share, **config)


def pairs(root):
    (table,) = made(root).tables
    return {frozenset((p.better, p.worse)): p for p in pairs_of(table, "best")}


def test_against_scipy_over_the_seeds_in_common(tmp_path):
    drawn = {
        method: {seed: shift + trees.random.uniform(0, 0.1) for seed in seeds}
        for method, shift, seeds in (
            ("snip", 0.5, range(5)),
            ("fts", 0.53, range(1, 7)),
            ("random", 0.4, range(4)),
            ("magnitude", 0.6, (0, 9)),  # too few in common
        )
    }
    study(tmp_path, drawn)
    found = pairs(tmp_path)
    assert len(found) == 3 and not any("magnitude" in pair for pair in found)
    for pair in found.values():
        seeds = sorted(drawn[pair.better].keys() & drawn[pair.worse].keys())
        a, b = ([100 * drawn[m][s] for s in seeds] for m in (pair.better, pair.worse))
        assert pair.n == len(seeds)
        assert pair.difference == pytest.approx(
            statistics.fmean(a) - statistics.fmean(b)
        )
        assert pair.difference >= 0
        assert pair.p == pytest.approx(ttest_rel(a, b).pvalue)


def test_differences_without_a_spread(tmp_path):
    study(
        tmp_path,
        {
            m: dict.fromkeys(range(3), a)
            for m, a in (("snip", 0.5), ("fts", 0.5), ("random", 0.25))
        },
    )
    found = pairs(tmp_path)
    assert found[frozenset(("snip", "fts"))].p == 1.0
    assert found[frozenset(("snip", "random"))].p == 0.0


def test_the_report_says_which(tmp_path):
    for sparsity in (0.9, 0.98):
        study(
            tmp_path,
            {
                "snip": {0: 0.50, 1: 0.52, 2: 0.51},
                "random": {0: 0.40, 1: 0.43, 2: 0.41},
                "fts": {0: 0.50, 1: 0.49, 2: 0.55},
            },
            sparsity,
        )
    _, output = report.write_report([tmp_path])
    text = (output / "report.md").read_text()
    for sparsity in ("0.9", "0.98"):
        assert f"- Sparsity {sparsity}, best weights: paired t tests" in text
    assert "(p below 0.05): snip over random (+9.67); fts over random (+10.00)." in text
    assert "tell 2 of 3 pairs of methods apart" in text
    assert "one in twenty apart by chance" in (output / "report.html").read_text()
    rows = list(csv.DictReader((output / "pairs.csv").open()))
    assert len(rows) == 2 * 2 * 3 and {r["weights"] for r in rows} == {"best", "last"}
    assert all(math.isfinite(float(r["p"])) and r["n"] == "3" for r in rows)


def test_few_seeds_are_not_compared(tmp_path):
    study(tmp_path, {m: {0: 0.5, 1: 0.6} for m in ("snip", "fts")})
    _, output = report.write_report([tmp_path])
    assert "paired" not in (output / "report.md").read_text()
    assert (output / "pairs.csv").read_text() == ""
