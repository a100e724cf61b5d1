from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split

from fisherprune import data
from fisherprune.data.dataset import Augmentation, Dataset, channel_statistics, resized
from fisherprune.data.registry import LOADERS
from fisherprune.data.splits import stratified_choice, train_validation_split
from fisherprune.errors import FieldError, FisherpruneError


def dataset_of(labels, classes):
    labels = torch.as_tensor(labels)
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    names = tuple(f"class {i}" for i in range(classes))
    return Dataset(
        images.to(torch.uint8), labels, names, (0.5,), (0.5,), Augmentation(0, False)
    )


def test_digits():
    train, test = data.load("digits")
    assert train.images.shape == (1437, 1, 8, 8) and len(test) == 360
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.images.max() > 240 and train.images.min() == 0
    assert train.classes == tuple("0123456789")
    assert train.augmentation == Augmentation(1, False)
    for part in (train, test):
        counts = torch.bincount(part.labels)
        assert counts.max() - counts.min() < 0.1 * len(part)
    again, _ = data.load("digits")
    assert torch.equal(train.images, again.images)


def test_digits_at_their_own_size_are_the_pixels_themselves():
    from sklearn.datasets import load_digits

    train, test = data.load("digits")
    pixels = torch.cat([train.images, test.images]).flatten(1).double() * 16 / 255
    labels = torch.cat([train.labels, test.labels])
    rows = torch.cat([pixels.round(), labels[:, None]], 1)
    digits = load_digits()
    truth = np.concatenate([digits.data, digits.target[:, None]], 1)
    assert sorted(rows.tolist()) == sorted(truth.tolist())


def test_digits_at_another_size():
    train, _ = data.load("digits", image_size=16)
    assert train.images.shape == (1437, 1, 16, 16)
    assert train.augmentation == Augmentation(2, False)


def test_normalized_training_images_have_mean_0_and_variance_1():
    train, _ = data.load("digits")
    x = torch.cat([images for images, _ in train.batches(500)]).double()
    assert abs(x.mean().item()) < 1e-6 and abs(x.var().item() - 1) < 1e-4


def test_batches_hold_everything_in_order_time_and_again():
    source = dataset_of(range(11), 11)
    batches = source.batches(4)
    for _ in range(2):
        parts = list(batches)
        assert [len(labels) for _, labels in parts] == [4, 4, 3]
        assert torch.equal(torch.cat([y for _, y in parts]), torch.arange(11))
        x = torch.cat([images for images, _ in parts])[:, 0, 0, 0]
        assert torch.allclose(x, (torch.arange(11) / 255 - 0.5) / 0.5)
    assert len(batches) == 3


def test_channel_statistics_against_float64():
    images = torch.randint(256, (40, 3, 9, 9), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=1e-12)
    truth = scaled.std((0, 2, 3), correction=0).tolist()
    assert std == pytest.approx(truth, rel=1e-12)


def test_a_constant_channel_is_an_error():
    images = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    images[:, 1] = 7
    with pytest.raises(FisherpruneError, match="channel 1 must vary .* value 7"):
        channel_statistics(images)


def test_resized():
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert resized(images, 8) is images
    assert resized(images, 12).shape == (2, 3, 12, 12)
    flat = torch.full((1, 1, 8, 8), 93, dtype=torch.uint8)
    assert (resized(flat, 5) == 93).all()


def test_split_is_stratified_fixed_and_whole():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 10)
    source = dataset_of(labels, 3)
    train, validation = train_validation_split(source)
    assert torch.bincount(train.labels).tolist() == [80, 40, 8]
    assert torch.bincount(validation.labels).tolist() == [20, 10, 2]
    pixels = torch.cat([train.images, validation.images])[:, 0, 0, 0]
    assert torch.equal(pixels.sort().values, source.images[:, 0, 0, 0])
    again, _ = train_validation_split(source)
    assert torch.equal(train.images, again.images)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_split_of_another_share_is_scikit_learns(share):
    source = dataset_of(torch.randint(3, (200,)), 3)
    parts = train_validation_split(source, share)
    indices = train_test_split(
        range(200), test_size=share, stratify=source.labels, random_state=42
    )
    for part, expected in zip(parts, indices, strict=True):
        assert torch.equal(part.images, source.images[expected])
        assert torch.equal(part.labels, source.labels[expected])


def test_no_share_leaves_all_images_in_their_order():
    source = dataset_of([2, 0, 1, 1], 3)  # too few for a split
    train, validation = train_validation_split(source, 0)
    assert torch.equal(train.images, source.images)
    assert train.labels.tolist() == [2, 0, 1, 1]
    assert len(validation) == 0 and validation.classes == source.classes


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 0, 0, 1], "at least 2 training images, got 1 of 'class 1'"),
        ([0, 0, 1, 1, 2, 2], "6 training images are too few for 3 classes"),
    ],
)
def test_split_of_too_few_images(labels, message):
    with pytest.raises(FisherpruneError, match=message):
        train_validation_split(dataset_of(labels, max(labels) + 1))


@pytest.mark.parametrize("size", [1, 2, 7, 50, 99, 100])
def test_stratified_choice(size):
    labels = torch.tensor([0] * 51 + [1] * 33 + [2] * 16)
    labels = labels[torch.randperm(100)]
    chance = torch.Generator().manual_seed(torch.initial_seed())
    before = chance.get_state()
    chosen = stratified_choice(labels, size, chance, name="n")
    assert len(chosen) == len(set(chosen.tolist())) == size
    counts = torch.bincount(labels[chosen], minlength=3).double()
    share = size * torch.bincount(labels).double() / 100
    assert (counts - share).abs().max() < 1
    again = stratified_choice(labels, size, chance.set_state(before), name="n")
    assert torch.equal(chosen, again)


def test_a_stratified_choice_of_equal_classes_takes_equally_many_of_each():
    labels = torch.arange(10).repeat(50)[torch.randperm(500)]
    chance = torch.Generator().manual_seed(torch.initial_seed())
    chosen = stratified_choice(labels, 100, chance, name="n")
    assert torch.bincount(labels[chosen]).tolist() == [10] * 10


def test_stratified_choice_mixes_the_classes():
    labels = torch.arange(10).repeat_interleave(50)
    chance = torch.Generator().manual_seed(torch.initial_seed())
    chosen = stratified_choice(labels, 500, chance, name="n")
    assert len(set(labels[chosen[:50]].tolist())) > 5


@pytest.mark.parametrize(
    "size, message",
    [
        (0, "train_samples must be at least 1, got 0"),
        (-1, "train_samples must be at least 1, got -1"),
        (11, "train_samples must be at most the 10 training images .*, got 11"),
    ],
)
def test_stratified_choice_of_a_size_there_is_not(size, message):
    with pytest.raises(FisherpruneError, match=f"^{message}$"):
        stratified_choice(
            torch.zeros(10, dtype=torch.int64),
            size,
            torch.Generator(),
            name="train_samples",
        )


@pytest.mark.parametrize(
    "name, got",
    [("mnist", "'mnist'"), ("cifar", r"'cifar' \(did you mean cifar10\?\)")],
)
def test_unknown_dataset_lists_the_known(name, got):
    assert {"cifar10", "cifar100", "digits", "folder"} <= LOADERS.keys()
    words = f"dataset must be one of {', '.join(LOADERS)}, got {got}"
    with pytest.raises(FieldError, match=f"^{words}$"):
        data.load(name)


def test_a_dataset_registers_itself(monkeypatch):
    for registry in (LOADERS, data.IMAGE_SIZES, data.BATCH_SIZES):
        monkeypatch.setitem(registry, "mine", None)
    asked = []

    @data.register_dataset("mine", image_size=12, batch_size=3)
    def load(request):
        asked.append((request.name, request.data_dir, request.image_size))
        return "train", "test"

    assert data.load("mine", "there") == ("train", "test")
    data.load("mine", "there", image_size=9)
    assert asked == [("mine", Path("there"), size) for size in (12, 9)]
    assert (data.IMAGE_SIZES["mine"], data.BATCH_SIZES["mine"]) == (12, 3)
    assert {"cifar10", "cifar100"} <= {*data.MIRRORED} and "mine" not in data.MIRRORED


def test_the_sizes_of_the_datasets():
    images = {
        "cifar10": 32,
        "cifar100": 32,
        "digits": 8,
        "folder": 32,
        "tinyimagenet": 64,
    }
    batches = {
        "cifar10": 512,
        "cifar100": 512,
        "digits": 16,
        "folder": 512,
        "tinyimagenet": 128,
    }
    assert images.items() <= data.IMAGE_SIZES.items()
    assert batches.items() <= data.BATCH_SIZES.items()
    assert LOADERS.keys() == data.IMAGE_SIZES.keys() == data.BATCH_SIZES.keys()


def test_moving_and_choosing_keep_the_rest():
    source = dataset_of([0, 1, 2, 1], 3)
    part = source.subset(torch.tensor([3, 0])).to(torch.device("cpu"))
    assert part.labels.tolist() == [1, 0] and part.classes == source.classes
    assert np.array_equal(part.images[:, 0, 0, 0], [3, 0])
