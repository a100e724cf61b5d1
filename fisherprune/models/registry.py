"""Our networks by name: each is a function of ``num_classes`` and ``in_channels``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fisherprune.models import resnet, vgg

Builder = Callable[..., nn.Module]

MODELS: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (
        resnet.resnet18,
        resnet.resnet20,
        resnet.resnet34,
        resnet.resnet50,
        resnet.resnet101,
        resnet.resnet152,
        vgg.lottery_vgg11,
        vgg.lottery_vgg16,
        vgg.vgg11,
        vgg.vgg13,
        vgg.vgg16,
        vgg.vgg19,
    )
}
