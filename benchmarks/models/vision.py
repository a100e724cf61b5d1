"""Models of torchvision, all that have a loss for each sample, and families of timm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherprune as fp
from benchmarks.models.case import CLASSES, SAMPLES, Case

Made = tuple[nn.Module, Any]


def torchvision_models(every: bool = False) -> Iterator[Case]:
    """Yield the smallest of each family, or all, but detectors and quantized ones.

    In training a detector returns one loss for all images of a batch, in evaluation
    none; quantized weights are not trained.
    """
    from torchvision import models

    kinds = {
        models: (image_classifier, fp.losses.classification),
        models.video: (clip_classifier, fp.losses.classification),
        models.segmentation: (segmenter, of_pixels),
        models.optical_flow: (flow, of_flow),
    }
    for module, (make, losses) in kinds.items():
        families: dict[str, list[str]] = {}
        for name in models.list_models(module=module):
            family = models.get_model_builder(name).__module__.rpartition(".")[2]
            families.setdefault(family, []).append(name)
        for family, names in families.items():
            for name in sorted(names, key=published_weights)[: None if every else 1]:
                shown = f"{name}{SMALLER_OF_TORCHVISION.get(name, '')}"
                yield Case("torchvision", family, shown, partial(make, name), losses)


SMALLER_OF_TORCHVISION = {
    "vgg11": ", pooled to 1 x 1",
    "mvit_v2_s": ", three blocks",
    "s3d": ", window of 2 x 2 x 2",
}
"""How models are changed that are large, or for large images, else."""


def published_weights(name: str) -> int:
    """Return how many weights a model of torchvision has."""
    from torchvision import models

    return next(iter(models.get_model_weights(name))).meta["num_params"]


def labelled(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return as many inputs of a shape as there are samples, with classes."""
    return torch.randn(SAMPLES, *shape), torch.randint(CLASSES, (SAMPLES,))


def image_classifier(name: str) -> Made:
    """Return a classifier, for small images where it can be made for them."""
    from torchvision import models

    sizes = {"maxvit_t": 224, "vit_h_14": 56, "inception_v3": 96}
    options: dict[str, Any] = {}
    size = sizes.get(name, 64)
    if name.startswith("vit_"):
        options = {"image_size": size}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": True}  # says that this takes long
    model = models.get_model(name, weights=None, num_classes=CLASSES, **options)
    if name == "vgg11":  # of whose 129 million weights 103 are one matrix
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier[0] = nn.Linear(512, 4096)
    return model, labelled((3, size, size))


def clip_classifier(name: str) -> Made:
    """Return a classifier of 16 frames."""
    from torchvision import models

    if name.startswith("mvit"):
        return small_mvit(), labelled((3, 16, 64, 64))
    model = models.get_model(name, weights=None, num_classes=CLASSES)
    if name == "s3d":  # whose window is that of images of 224 pixels
        model.avgpool = nn.AvgPool3d(2, 1)
    return model, labelled((3, 16, 64, 64))


def small_mvit() -> nn.Module:
    """Return an MViT of version 2 of three blocks; those with names are for 224."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    kernel, one, half = [3, 3, 3], [1, 1, 1], [1, 2, 2]
    blocks = [
        MSBlockConfig(1, 32, 32, kernel, kernel, one, [1, 4, 4]),
        MSBlockConfig(2, 32, 64, kernel, kernel, half, half),
        MSBlockConfig(2, 64, 64, kernel, kernel, one, half),
    ]
    return MViT(
        spatial_size=(64, 64),
        temporal_size=16,
        block_setting=blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=CLASSES,
    )


def segmenter(name: str) -> Made:
    """Return a model that classifies pixels."""
    from torchvision import models

    options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    classes = torch.randint(CLASSES, (SAMPLES, 64, 64))
    batch = torch.randn(SAMPLES, 3, 64, 64), classes
    return models.get_model(name, **options), batch


def of_pixels(model: Any, batch: Any) -> Tensor:
    """Return the mean cross-entropy over each image's pixels."""
    x, y = batch
    return F.cross_entropy(model(x)["out"], y, reduction="none").mean((1, 2))


def flow(name: str) -> Made:
    """Return a model of the motion between two images."""
    from torchvision import models

    pairs = torch.randn(SAMPLES, 2, 3, 128, 128), torch.randn(SAMPLES, 2, 128, 128)
    return models.get_model(name, weights=None), pairs


def of_flow(model: Any, batch: Any) -> Tensor:
    """Return the mean distance of each pair's motion, after two rounds."""
    x, y = batch
    return (model(x[:, 0], x[:, 1], 2)[-1] - y).abs().mean((1, 2, 3))


def timm_models(every: bool = False) -> Iterator[Case]:
    """Yield a small model of each of timm's families."""
    import timm

    for family in timm.list_modules():
        if names := timm.list_models(module=family):
            name = min(names, key=size_by_name)
            options = SMALLER.get(name, {})
            make = partial(small_image_classifier, name, options)
            shown = ", ".join([name, *(f"{n}={v}" for n, v in options.items())])
            yield Case("timm", family, shown, make, fp.losses.classification)


SIZES = (
    *("test", "atto", "femto", "pico", "zepto", "nano", "xxs", "xxt", "xs", "micro"),
    *("tiny", "mini", "small", "_t", "_s", "_m", "base", "_b"),
)


def size_by_name(name: str) -> tuple[int, list[int], str]:
    """Order models by the word for a size in their names, then by numbers."""
    place = next((i for i, word in enumerate(SIZES) if word in name), len(SIZES))
    return place, [int(number) for number in re.findall(r"\d+", name)], name


SMALLER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("beitv2_base_patch16_224", "deepseek_vit_412m", "gemma4_vit_167m"),
        {"depth": 2},
    ),
    **dict.fromkeys(
        ("naflexvit_base_patch16_siglip", "qwen3_vit_88m_merge"), {"depth": 2}
    ),
    "samvit_base_patch16": {"depth": 3},  # the third is of another kind
    "mobilenetv5_base": {"channel_multiplier": 0.25},
    "vgg11_bn": {"mlp_ratio": 0.0625},
}
"""Options of models of which the smallest is large: of 80 million weights or more."""


PIXELS = {"efficientvit_m0": 128}
"""Of models whose last norms see one position else, and let rounding grow."""


def small_image_classifier(name: str, sizes: Mapping[str, Any]) -> Made:
    """Return a model of timm, for the smallest images that it takes."""
    import timm

    known: Any = timm.get_pretrained_cfg(name)
    native = known.input_size[1]
    least = PIXELS.get(name, 64)
    widths = (pixels for pixels in (64, 84, 128) if pixels >= least)
    tried = ((pixels, sized) for pixels in widths for sized in (False, True))
    for pixels, sized in tried:
        options = {**sizes, "img_size": pixels} if sized else sizes
        try:
            model = timm.create_model(name, num_classes=CLASSES, **options).eval()
            batch = labelled((3, pixels, pixels))
            with torch.no_grad():
                model(batch[0])
        except Exception:  # not of this size, or not by this word
            continue
        return model, batch
    model = timm.create_model(name, num_classes=CLASSES, **sizes)
    return model, labelled((3, native, native))
