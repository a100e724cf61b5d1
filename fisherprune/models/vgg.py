"""VGG with BatchNorm for small images (Simonyan and Zisserman 2015, arXiv 1409.1556).

The convolutional part of the paper's configurations A, B, D and E, each convolution
followed by BatchNorm, and one Linear layer in place of the three of the paper, as is
usual for CIFAR. Any image size works: max-pools round up, which at multiples of 32
changes nothing, and what is left is averaged before the classifier.

The ``lottery`` networks are those of OpenLTH, the framework of the lottery ticket
literature, and of Tanaka et al. 2020 (arXiv 2006.05467): no max-pool follows the last
stage, so that images of 32 x 32 are averaged over 2 x 2 positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, a max-pool after each, mean, ``linear``."""

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        pools: int = 5,
    ) -> None:
        """Build the network.

        Args:
            depths: number of convolutions of each stage.
            num_classes: outputs of the classifier.
            in_channels: channels of the images.
            pools: number of stages, from the first, that a max-pool follows.
        """
        super().__init__()
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        channels, index = in_channels, 0
        for stage, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True), 1):
            for _ in range(depth):
                index += 1
                modules[f"conv{index}"] = nn.Conv2d(channels, width, 3, padding=1)
                modules[f"bn{index}"] = nn.BatchNorm2d(width)
                modules[f"relu{index}"] = nn.ReLU()
                channels = width
            if stage <= pools:
                modules[f"pool{stage}"] = nn.MaxPool2d(2, ceil_mode=True)
        self.features = nn.Sequential(modules)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        return self.linear(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def vgg11(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG11 (configuration A), 9,231,114 parameters with 10 classes."""
    return VGG((1, 1, 2, 2, 2), num_classes, in_channels)


def vgg13(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG13 (configuration B), 9,416,010 parameters with 10 classes."""
    return VGG((2, 2, 2, 2, 2), num_classes, in_channels)


def vgg16(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG16 (configuration D), 14,728,266 parameters with 10 classes."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels)


def vgg19(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG19 (configuration E), 20,040,522 parameters with 10 classes."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels)


def lottery_vgg11(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG11 without the last max-pool, 9,231,114 parameters with 10 classes."""
    return VGG((1, 1, 2, 2, 2), num_classes, in_channels, pools=4)


def lottery_vgg16(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG16 without the last max-pool, 14,728,266 parameters with 10 classes."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels, pools=4)
