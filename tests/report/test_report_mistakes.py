"""Broken results and wrong command lines: one line each, and what is whole stays."""

import sys

import pytest
import result_trees as trees
import torch
from html_page import Page

from fisherprune.errors import FisherpruneError
from fisherprune.masks.masks import Masks
from fisherprune.report import load, overlap
from fisherprune.report.__main__ import main

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_text("{"), "is no JSON: truncated"),
        (lambda path: trees.change(path, "test/last"), "test.last is missing"),
        (lambda path: trees.change(path, "config/lr", "x"), "config.lr must be a numb"),
    ],
)
def test_a_broken_file_alone_and_among_others(
    spoil, message, tmp_path, capsys, mistake
):
    trees.add_run(tmp_path, 0.5, seed=0)
    bad = trees.add_run(tmp_path, 0.5, seed=1)
    spoil(bad / "results.json")
    for alone in (bad, bad / "results.json"):
        err = mistake(main, alone, "--quiet")
        assert f"fisherprune.report: error: {bad / 'results.json'}: {message}" in err
        assert not (bad / "report").exists()
    assert main([str(tmp_path), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "1 finished, 1 broken files" in out
    assert f"broken: runs/{bad.name}: results.json: {message}" in err  # no more of it
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert any(bad.name in text and message in text for text in page.texts)


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
        "config.json: sparsity must be a number, got 'much'",
    ):
        assert part in err


def test_a_results_folder_has_a_format_of_its_own(tmp_path, monkeypatch):
    trees.add_run(tmp_path, 0.5)
    monkeypatch.setattr(load, "FOLDER_FORMAT", 2)
    (tmp_path / load.MARK).write_text('{"format": 2}')
    assert len(load.load([tmp_path]).finished) == 1
    (tmp_path / load.MARK).write_text('{"format": 1}')
    with pytest.raises(FisherpruneError, match="format must be 2, got 1"):
        load.load([tmp_path])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "no runs in "),
        (lambda p: (p / "x.json").write_text("{}"), "no runs in "),
        (lambda p: (p / load.MARK).write_text('{"format": 2}'), "format must be 1"),
        (lambda p: (p / load.MARK).write_text("{"), f"{load.MARK}: is no JSON"),
    ],
)
def test_nothing_to_report(make, message, tmp_path, mistake):
    make(tmp_path)
    err = mistake(main, tmp_path, "--quiet")
    assert message in err and str(tmp_path) in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/nowhere"], "results must be a folder that exists, got /nowhere"),
        (["/dev/null"], "results must be a folder or a results.json, got /dev/null"),
        ([], "the following arguments are required: RESULTS"),
        (["--foo"], "unrecognized arguments: --foo"),
        ([""], "argument RESULTS: must be a path, got ''"),
        (["RESULTS", "--output="], "argument --output: must be a path, got ''"),
        (["RESULTS", "--output", "/dev/null/x"], "output must be a folder that can be"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, mistake):
    trees.add_run(tmp_path, 0.5)
    err = mistake(main, *(tmp_path if a == "RESULTS" else a for a in arguments))
    assert err.startswith("fisherprune.report: error: ") and message in err


def test_matplotlib_is_asked_for_by_name(tmp_path, monkeypatch, mistake):
    trees.add_run(tmp_path, 0.5)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    err = mistake(main, tmp_path, "--quiet")
    assert 'python -m pip install "fisherprune[report]"' in err
