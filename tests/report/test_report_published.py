"""Published numbers beside those of a results folder."""

from dataclasses import replace

import pytest
import result_trees as trees
from result_trees import made

from fisherprune.report.pages.content import content_of
from fisherprune.report.pages.render import markdown
from fisherprune.report.published import TABLE_1, published_for
from fisherprune.runs.config import TrainConfig

pytest.importorskip("matplotlib")


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


def test_what_a_method_had_alone_is_asked_of_its_runs_alone():
    own = {"fts": {"group_size": 4}, "fbss": {"group_size": 2, "bn_warmup": True}}
    table = replace(TABLE_1, setting=replace(TABLE_1.setting, own=own))
    same = TrainConfig()
    for values, methods in (
        ({}, set(trees.PUBLISHED_METHODS) - {"fts", "fbss"}),
        ({"group_size": 4}, {"fts"}),
        ({"group_size": 2, "bn_warmup": True}, {"fbss"}),
    ):
        part = table.beside(replace(same, **values))
        assert part.cells == {k: v for k, v in TABLE_1.cells.items() if k[0] in methods}
    assert table.beside(replace(same, group_size=2)) is None


def test_differences_to_published_numbers(tmp_path):
    trees.add_run(tmp_path, 0.8774, method="fts", sparsity=0.98, seed=0)
    trees.add_run(tmp_path, 0.8694, method="fts", sparsity=0.98, seed=1)
    trees.add_run(tmp_path, 0.85, method="grasp_reversed", sparsity=0.98)
    trees.add_run(tmp_path, 0.84, method="grasp", sparsity=0.98)
    trees.add_run(tmp_path, 0.84, method="fts", sparsity=0.97)
    whole = made(tmp_path)
    (each,) = whole.tables
    assert each.difference("fts", 0.98, "best") == pytest.approx(87.34 - 87.24)
    assert each.difference("grasp_reversed", 0.98, "best") == pytest.approx(-0.99)
    assert each.difference("grasp", 0.98, "best") is None
    assert each.difference("fts", 0.97, "best") is None
    text = markdown(content_of(whole))
    assert "| published |  | 85.99 ± 0.08 | 87.24 ± 0.32 |" in text
    assert "| difference |  | -0.99 | +0.10 |" in text
    assert "The published GraSP column stands beside our grasp\\_reversed" in text


def test_folder_images_are_said_to_be_files(tmp_path):
    fields = {"dataset": "folder", "data_dir": "/x/cifar10-jpeg", "sparsity": 0.9}
    trees.add_run(tmp_path, 0.9, **fields)
    whole = made(tmp_path)
    (each,) = whole.tables
    assert each.published is TABLE_1 and each.dataset == "folder cifar10-jpeg"
    text = markdown(content_of(whole))
    assert "probably CIFAR-10 as JPEG files" in text and "/x/" not in text
