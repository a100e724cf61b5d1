import pytest
import torch

from fisherprune.data.augment import TrainingBatches, batch_sizes, crop_and_flip, draw
from fisherprune.data.dataset import Augmentation, Dataset


def augment(images, augmentation, generator):
    drawn = draw(len(images), augmentation, generator)
    return crop_and_flip(images, *drawn, augmentation.padding)


def one_by_one(images, shifts, flips, padding):
    """Pad, cut and mirror image after image, pixel after pixel."""
    out = torch.zeros_like(images)
    batch, channels, height, width = images.shape
    for n in range(batch):
        for row in range(height):
            for column in range(width):
                y = row + int(shifts[0, n]) - padding
                x = column + int(shifts[1, n]) - padding
                if 0 <= y < height and 0 <= x < width:
                    to = width - 1 - column if flips[n] else column
                    out[n, :, row, to] = images[n, :, y, x]
    return out


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("shape", [(9, 3, 6, 6), (5, 1, 4, 7)])
def test_crop_and_flip_equals_a_loop(padding, shape):
    images = torch.randint(1, 256, shape).to(torch.uint8)
    shifts = torch.randint(2 * padding + 1, (2, shape[0]))
    flips = torch.randint(2, (shape[0],)).bool()
    result = crop_and_flip(images, shifts, flips, padding)
    assert result.dtype == torch.uint8
    assert torch.equal(result, one_by_one(images, shifts, flips, padding))


def test_every_shift_and_both_flips_are_drawn_evenly():
    pixel = torch.zeros(20_000, 1, 5, 5, dtype=torch.uint8)
    pixel[:, 0, 2, 2] = 1
    pixel[:, 0, 2, 3] = 2  # the right neighbour shows a flip
    out = augment(pixel, Augmentation(1, True), torch.Generator().manual_seed(0))
    centres = (out == 1).flatten(1).float().argmax(1)
    counts = torch.bincount(centres, minlength=25)
    assert (counts > 0).sum() == 9
    spread = 4 * (20_000 / 9) ** 0.5
    assert (counts[counts > 0] - 20_000 / 9).abs().max() < spread
    flipped = (out == 2).flatten(1).float().argmax(1) < centres
    assert abs(flipped.sum().item() - 10_000) < 4 * 5000**0.5


def test_no_padding_and_no_flip_change_nothing():
    images = torch.randint(256, (7, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(
        augment(images, Augmentation(0, False), torch.Generator()), images
    )


def test_draws_depend_on_the_generator_alone():
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    expected = torch.random.get_rng_state()
    a, b, c = (
        augment(images, Augmentation(2, True), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), expected)


@pytest.mark.parametrize(
    "total, size, sizes",
    [
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (9, 4, [4, 5]),
        (3, 4, [3]),
        (1, 4, [1]),
        (5, 2, [2, 3]),
    ],
)
def test_batch_sizes(total, size, sizes):
    assert batch_sizes(total, size) == sizes


def numbered(count):
    """Images that show their own index."""
    numbers = torch.arange(count)
    return Dataset(
        numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2),
        numbers,
        tuple(map(str, range(count))),
        (0.0,),
        (1.0,),
        Augmentation(0, True),
    )


def test_an_epoch_is_every_image_once_in_a_new_order():
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    batches = TrainingBatches(numbered(33), 8, *generators)
    orders = []
    for _ in range(2):
        parts = list(batches)
        assert len(parts) == len(batches) == 4
        assert [len(labels) for _, labels in parts] == [8, 8, 8, 9]
        for images, labels in parts:
            assert images.dtype == torch.float32
            assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
        orders.append(torch.cat([labels for _, labels in parts]))
        assert torch.equal(orders[-1].sort().values, torch.arange(33))
    assert not torch.equal(*orders)


def test_augmentation_does_not_move_the_order():
    def order_of(chance):
        generators = (torch.Generator().manual_seed(s) for s in (3, chance))
        batches = TrainingBatches(numbered(20), 6, *generators)
        return torch.cat([labels for _, labels in batches])

    assert torch.equal(order_of(1), order_of(2))
