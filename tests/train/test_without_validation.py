"""Runs that hold out no images, and runs with other initial weights."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from trainings import images_of, rows, stopped

import fisherprune as fp
from fisherprune import data, models, train
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.identity import identity
from fisherprune.runs.reader import read_run
from fisherprune.runs.words import table
from fisherprune.streams import stream_seed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def whole(small):
    """Return two short epochs without validation."""
    return replace(small, validation_share=0.0, epochs=2)


def test_all_images_are_trained_on(whole):
    official, _ = data.load("digits")
    images = images_of(replace(whole, train_samples=None, score_samples=None))
    assert torch.equal(images.train.images, official.images)
    assert torch.equal(images.train.labels, official.labels)
    assert len(images.validation) == 0 and len(images.scoring) == len(official)


def test_the_last_weights_are_the_best(whole, capsys):
    result = train.run(whole)
    assert "validation" not in capsys.readouterr().out
    assert result.best_epoch == 2 and result.best == result.last
    last, best = (
        load_file(result.folder / f"{name}.safetensors") for name in ("last", "best")
    )
    assert last.keys() == best.keys()
    assert all(torch.equal(last[name], best[name]) for name in last)
    columns = [k for k in rows(result.folder)[0] if k.startswith("validation")]
    assert columns
    assert not any(row[k] for row in rows(result.folder) for k in columns)
    read = read_run(result.folder / "results.json", "x")
    assert (read.best_epoch, read.test) == (2, result.test)
    text = table(result)
    assert f"{100 * result.last.accuracy:.2f}" in text and "validation" not in text


def test_no_epochs_and_no_validation(whole):
    result = train.run(replace(whole, epochs=0), quiet=True)
    assert result.best_epoch == 0 and result.best == result.last
    assert (result.folder / "best.safetensors").exists()


@pytest.mark.parametrize("checkpoint", [1, 2, 3])
def test_it_resumes_bit_for_bit(whole, tmp_path, checkpoint):
    expected = train.run(whole, quiet=True)
    folder = tmp_path / "stopped"
    stopped(whole, folder, checkpoint)  # after the mask, the first epoch, the last
    assert not (folder / "best.safetensors").exists()
    resumed = train.run(whole, folder=folder, quiet=True)
    assert (resumed.best_epoch, resumed.test) == (2, expected.test)
    assert rows(folder) == rows(expected.folder)
    for name in ("last", "best", "masks"):
        file = f"{name}.safetensors"
        assert (folder / file).read_bytes() == (expected.folder / file).read_bytes()


def test_the_share_is_a_part_of_the_run_unless_it_is_the_default():
    assert identity(TrainConfig(validation_share=0.2)) == identity(TrainConfig())
    shares = (0.2, 0.1, 0)
    assert len({identity(TrainConfig(validation_share=s)) for s in shares}) == 3


@pytest.mark.parametrize("init", models.INITS)
def test_a_run_begins_with_the_weights_it_asks_for(small, init):
    result = train.run(replace(small, epochs=0, init=init), quiet=True)
    seed = stream_seed(0, "initialization")
    own = models.create("resnet20", 10, 1, image_size=8, init=init, seed=seed)
    fp.Masks.load(result.folder / "masks.safetensors").apply_(own)
    found = load_file(result.folder / "last.safetensors")
    for name, value in own.state_dict().items():
        assert torch.equal(found[name], value), name


def test_new_weights_under_the_mask_are_of_the_same_distribution(small):
    config = replace(small, epochs=0, init="kaiming_normal", sparsity=0.0)
    plain, anew = (
        load_file(
            train.run(replace(config, reinitialize=x), quiet=True).folder
            / "last.safetensors"
        )
        for x in (False, True)
    )
    assert not anew["linear.bias"].any()
    name = "layer3.2.conv2.weight"
    assert not torch.equal(plain[name], anew[name])
    for weights in (plain, anew):
        assert weights[name].var().item() == pytest.approx(2 / (64 * 9), rel=0.1)
