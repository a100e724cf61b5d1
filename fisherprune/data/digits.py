"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import torch

from fisherprune.data.dataset import Augmentation, Dataset, channel_statistics, resized
from fisherprune.data.registry import Request, register_dataset
from fisherprune.data.splits import split

TEST_SHARE = 0.2


@register_dataset("digits", image_size=8, batch_size=16)
def load(request: Request) -> tuple[Dataset, Dataset]:
    """Return 1,437 training and 360 test images of one channel, a fixed split.

    The 17 grey levels are spread over 0 to 255. Source: UCI "Optical Recognition of
    Handwritten Digits", the test set of which scikit-learn carries.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    images = resized(grey.unsqueeze(1), request.image_size)
    everything = Dataset(
        images,
        torch.from_numpy(digits.target).long(),
        tuple(str(digit) for digit in digits.target_names),
        (),
        (),
        Augmentation(padding=request.image_size // 8, flip=False),
    )
    train, test = split(everything, TEST_SHARE)
    mean, std = channel_statistics(train.images)
    return replace(train, mean=mean, std=std), replace(test, mean=mean, std=std)
