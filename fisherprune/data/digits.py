"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn."""

from __future__ import annotations

import torch

from fisherprune.data.dataset import Augmentation, Dataset, channel_statistics, resized
from fisherprune.data.registry import Request, register_dataset

TEST_SHARE = 0.2
SPLIT_SEED = 42


@register_dataset("digits", image_size=8, batch_size=16)
def load(request: Request) -> tuple[Dataset, Dataset]:
    """Return 1,437 training and 360 test images of one channel, a fixed split.

    The 17 grey levels are spread over 0 to 255. Source: UCI "Optical Recognition of
    Handwritten Digits", the test set of which scikit-learn carries.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    images = resized(grey.unsqueeze(1), request.image_size)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(),
        test_size=TEST_SHARE,
        stratify=labels.numpy(),
        random_state=SPLIT_SEED,
    )
    mean, std = channel_statistics(images[train])
    everything = Dataset(
        images,
        labels,
        tuple(str(digit) for digit in digits.target_names),
        mean,
        std,
        Augmentation(padding=request.image_size // 8, flip=False),
    )
    return (
        everything.subset(torch.from_numpy(train)),
        everything.subset(torch.from_numpy(test)),
    )
