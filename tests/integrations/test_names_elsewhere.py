"""The tables of docs/from_other_libraries.md: both columns of each row are run."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import fisherprune as fp

PAGE = Path(__file__).parents[2] / "docs" / "from_other_libraries.md"
N, K = 10, 120
"""Samples; draws of estimates."""


def tables():
    """Return {heading: [[cell, ...], ...]}; a cell is its first code, if it has one."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        rows = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)[2:]
        cells = [[c.strip() for c in row.split(" | ")] for row in rows]
        found[heading] = [
            [m[1] if (m := re.match("`(.*?)`", c)) else c for c in row] for row in cells
        ]
    return {heading: rows for heading, rows in found.items() if rows}


TABLES = tables()


@pytest.fixture(scope="module")
def known():
    """Return the names that all tables use, for one network and batch."""
    torch.manual_seed(torch.seed() % 2**32)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(),
        nn.Linear(4, 3),
    )  # fmt: skip
    x, y = torch.randn(N, 1, 3, 3), torch.randint(3, (N,))
    every = dict(model.named_parameters())
    batches = [(x, y)]
    return {
        "fp": fp, "torch": torch, "model": model, "x": x, "y": y, "batches": batches,
        "every": every, "N": N, "K": K, "vmap": vmap, "grad": grad,
        "moments": fp.gradient_moments(model, batches, parameters=every),
        "diagonals": fp.gauss_newton_diagonal(model, batches, parameters=every),
    }  # fmt: skip


def here(known, expression):
    """Return what our column gives, of all parameters."""

    def of(name):
        moments = known["moments"]
        short = {"m": moments.mean[name], "F": moments.fisher[name], "name": name}
        return eval(expression, known | short | {"H": known["diagonals"][name]})

    return torch.cat([of(name).flatten() for name in known["every"]])


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def extended(known, *extensions, reduction="mean"):
    """Return parameters after BackPACK's backward pass."""
    backpack = pytest.importorskip("backpack")
    model = backpack.extend(copy.deepcopy(known["model"]))
    loss = backpack.extend(nn.CrossEntropyLoss(reduction=reduction))
    with backpack.backpack(*extensions):
        loss(model(known["x"]), known["y"]).backward()
    return dict(model.named_parameters())


def of_each(known, parameters, expression):
    names = known | {"p": None}
    parts = [eval(expression, names | {"p": p}) for p in parameters.values()]
    return torch.cat([part.flatten() for part in parts]).detach()


@pytest.mark.parametrize("row", TABLES["BackPACK"], ids=lambda row: row[1])
def test_backpack(known, row):
    extensions = pytest.importorskip("backpack.extensions")
    name, theirs, ours = row
    chosen = [getattr(extensions, name)()] if name[0].isupper() else []
    parameters = extended(known, *chosen)
    expected = of_each(known, parameters, theirs)
    assert close(here(known, ours), expected) and expected.max() > 0


def test_backpack_of_a_sum(known):
    extensions = pytest.importorskip("backpack.extensions")
    assert "`moments.sum_sq[name]`" in PAGE.read_text()
    parameters = extended(known, extensions.SumGradSquared(), reduction="sum")
    expected = of_each(known, parameters, "p.sum_grad_squared")
    assert close(here(known, "moments.sum_sq[name]"), expected)


def curvlinops_names(known):
    curvlinops = pytest.importorskip("curvlinops")
    model = copy.deepcopy(known["model"])
    about = {
        "model": model, "loss": nn.CrossEntropyLoss(), "data": known["batches"],
        "params": [*model.parameters()],
        "diagonal": lambda A: torch.diagonal(A @ torch.eye(A.shape[0])),
    }  # fmt: skip
    return vars(curvlinops) | known | about


@pytest.mark.parametrize("row", TABLES["curvlinops"], ids=lambda row: row[0])
def test_curvlinops(known, row):
    theirs, ours = row
    assert close(here(known, ours), eval(theirs, curvlinops_names(known)))


@pytest.mark.parametrize("row", TABLES["torch.func and Opacus"], ids=lambda row: row[0])
def test_gradients_of_each_sample(known, row):
    theirs, ours = row
    model = copy.deepcopy(known["model"])

    def loss_of(weights, x, y):
        return F.cross_entropy(functional_call(model, weights, x[None]), y[None])

    if "grad_sample" in theirs:
        opacus = pytest.importorskip("opacus")
        module = opacus.GradSampleModule(model)
        F.cross_entropy(module(known["x"]), known["y"]).backward()
        expected = of_each(known, dict(model.named_parameters()), theirs)
    else:
        names = known | {"loss_of": loss_of}
        parts = [eval(theirs, names | {"name": name}) for name in known["every"]]
        expected = torch.cat([part.flatten() for part in parts]).detach()
    assert close(here(known, ours), expected)


def importances(known, size):
    """Return the mean over mini-batches of the squared gradient of their mean loss."""
    model = copy.deepcopy(known["model"])
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    parts = [*zip(known["x"].split(size), known["y"].split(size), strict=True)]
    for x, y in parts:  # the last one is smaller
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad**2 / len(parts)
    return total


@pytest.mark.parametrize(
    "row", TABLES["Avalanche and other loops of EWC"], ids=lambda row: row[0]
)
def test_elastic_weight_consolidation(known, row):
    theirs, ours = row
    names = {"per_batch": {size: importances(known, size) for size in (1, 4)}}
    parts = [eval(theirs, names | {"name": name}) for name in known["every"]]
    assert close(here(known, ours), torch.cat([part.flatten() for part in parts]))


@pytest.mark.parametrize(
    "row", TABLES["Estimates from random draws"], ids=lambda row: row[0]
)
def test_estimates(known, row):
    theirs, ours, exact = row
    truth, draws = here(known, exact), []
    for _ in range(3):
        names = known | {"K": K // 3}
        if theirs.startswith("p."):
            extensions = pytest.importorskip("backpack.extensions")
            parameters = extended(known, extensions.DiagGGNMC(K // 3))
            draws.append(of_each(names, parameters, theirs))
        else:
            draws.append(eval(theirs, curvlinops_names(names)))
    for found in (here(known, ours), torch.stack(draws).mean(0)):
        if "hutchinson" in theirs:  # the trace's variance is at most 2 trace^2 / K
            assert (found - truth).sum().abs() < 5 * math.sqrt(2 / K) * truth.sum()
        else:
            assert (found - truth).norm() < 0.3 * truth.norm()
