"""The table of models: its rows tell right from wrong, its page is that of its file."""

import json
import types

import pytest
import torch
from torch import nn

import fisherprune as fp
from benchmarks.models import __main__ as program
from benchmarks.models.case import CLASSES, SAMPLES, Case
from benchmarks.models.measure import measure
from benchmarks.models.page import commits, page

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A branch that begins at zero, and a weight that no loss depends on."""

    def __init__(self, mixes=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.gate = nn.Parameter(torch.zeros(6, 1, 1))
        self.head, self.spare = nn.Linear(6, CLASSES), nn.Linear(2, 2)
        self.mixes = mixes

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = (x + self.gate * torch.tanh(x)).mean((2, 3))
        return self.head(x - x.mean(0) if self.mixes else x)


def case(mixes=False):
    batch = torch.randn(SAMPLES, 3, 6, 6), torch.randint(CLASSES, (SAMPLES,))
    make = lambda: (Net(mixes), batch)  # noqa: E731
    return Case("own", "net", "net", make, fp.losses.classification)


def test_a_row_says_ways_and_errors():
    row = measure(case())
    conv, head = 3 * 6 * 9, 6 * CLASSES
    sizes = {"conv2d": conv + 6, "batch_norm": 12, "mul": 6, "unused": 6}
    sizes["linear"] = head + CLASSES
    total = sum(sizes.values())
    assert row["weights"] == total
    assert row["ways"] == pytest.approx({n: s / total for n, s in sizes.items()})
    # By its place the spare layer is the classifier.
    assert row["prunable"] == pytest.approx((conv + head) / total)
    assert row["error"] < 1e-6 and row["float32 error"] < 1e-4
    assert row["float32 loop's error"] < 1e-4


def test_a_wrong_number_shows(monkeypatch):
    right = fp.gradient_moments

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        return types.SimpleNamespace(
            fisher={
                n: f * (1.25 if n == "conv.bias" else 1)
                for n, f in found.fisher.items()
            }
        )

    monkeypatch.setattr(fp, "gradient_moments", wrong)
    row = measure(case())
    assert row["error"] == pytest.approx(0.25, rel=1e-3)
    assert row["float32 error"] == pytest.approx(0.25, rel=1e-2)


def record(rows):
    place = {"torch": "2", "commit": "c" * 40, "library": "1", "dirty": False}
    return {"environment": place, "rows": rows}


def test_samples_that_mix_are_refused():
    row = program.tried(case(mixes=True))
    assert "error" not in row and "mix" in row["refused"]
    text = page([record([program.tried(case()), row])])
    assert "1 of 2 models: every weight is covered." in text
    assert "| net | net | | | refused | | |" in text
    assert f"- net: {row['refused'].splitlines()[0]}" in text


def test_what_is_slow_is_explained():
    row = {"library": "own", "family": "f", "model": "m", "weights": 8}
    row |= {"prunable": 0.5, "ways": {"linear": 0.5, "loop": 0.25, "mul": 0.25}}
    row |= {"reasons": ["of a reason"], "error": None, "float32 error": 1e-6}
    lines = page([record([row])]).splitlines()
    ways = "fused 50.0%, rows 25.0%, loop 25.0%"
    assert f"| f | m | 8 | 50.0% | {ways} | - | 1.0e-06 / - |" in lines
    assert "- f: of a reason" in lines


def test_families_that_are_tried_again_replace_their_rows(monkeypatch, tmp_path):
    def run(commit, families, *names):
        place = {"torch": "2", "commit": commit * 40, "dirty": False}
        monkeypatch.setattr(program, "environment", lambda: place)
        found = [Case("timm", name[0], name, None, None) for name in names]
        monkeypatch.setattr(program, "cases", lambda *_: found)
        row = lambda case: {"family": case.family, "model": case.name, "at": commit}  # noqa: E731
        monkeypatch.setattr(program, "tried", row)
        program.try_library("timm", families, False, tmp_path)
        return json.loads((tmp_path / "models-timm.json").read_text())

    pytest.importorskip("timm")
    run("a", [], "one", "two")
    record = run("b", ["t"], "two, depth=2")
    rows = [(row["model"], row["at"], row["commit"][0]) for row in record["rows"]]
    assert rows == [("one", "a", "a"), ("two, depth=2", "b", "b")]
    wanted = f"{'a' * 10}, {'b' * 10}"
    assert commits(record["environment"], record["rows"]) == wanted
    assert len(run("c", [], "one")["rows"]) == 1


@pytest.mark.parametrize(
    "library, family",
    [("torchvision", "squeezenet"), ("transformers", "gpt2"), ("peft", "IA3")]
    + [("timm", "ghostnet")],
)
def test_models_of_libraries_are_made(library, family):
    pytest.importorskip(library)
    (found,) = program.cases(library, [family])
    model, batch = found.make()
    losses = found.losses(model.eval(), batch)
    assert losses.shape == (SAMPLES,) and losses.isfinite().all()


def test_the_page_is_that_of_the_files():
    found = program.read()
    assert program.PAGE.read_text() == page(found)
    errors = [row.get("error") or 0 for each in found for row in each["rows"]]
    assert 0 < max(errors) < 1e-4
