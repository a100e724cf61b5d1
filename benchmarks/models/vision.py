"""Models of torchvision, all that have a loss for each sample, and families of timm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherprune as fp
from benchmarks.models.case import CLASSES, SAMPLES, Case

Made = tuple[nn.Module, Any]
CLIPS: dict[str, Any] = {"mvit": {"spatial_size": (64, 64), "temporal_size": 16}}


def torchvision_models() -> Iterator[Case]:
    """Yield those of torchvision but detectors and quantized ones.

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
        for name in models.list_models(module=module):
            family = models.get_model_builder(name).__module__.rpartition(".")[2]
            yield Case("torchvision", family, name, partial(make, name), losses)


def labelled(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return as many inputs of a shape as there are samples, with classes."""
    return torch.randn(SAMPLES, *shape), torch.randint(CLASSES, (SAMPLES,))


def image_classifier(name: str) -> Made:
    """Return a classifier, for small images where it can be made for them."""
    from torchvision import models

    sizes = {"maxvit_t": 224, "vit_h_14": 56, "inception_v3": 96}
    size, options = sizes.get(name, 64), {}
    if name.startswith("vit_"):
        options = {"image_size": size}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": True}  # says that this takes long
    model = models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return model, labelled((3, size, size))


def clip_classifier(name: str) -> Made:
    """Return a classifier of 16 frames."""
    from torchvision import models

    options = CLIPS.get(name.partition("_")[0], {})
    model = models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return model, labelled((3, 16, 64, 64))


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


def timm_models() -> Iterator[Case]:
    """Yield the smallest model of each of timm's families."""
    import timm

    for family in timm.list_modules():
        if names := timm.list_models(module=family):
            make = partial(small_of_timm, names)
            yield Case("timm", family, family, make, fp.losses.classification)


def small_of_timm(names: list[str]) -> Made:
    """Return the smallest of some models, for the smallest images that it takes."""
    import timm

    name = min(names, key=weights_of_timm)
    size = timm.create_model(name, num_classes=CLASSES).default_cfg["input_size"][1]
    options: list[dict[str, int]] = [{}, {"img_size": 64}, {"img_size": 128}]
    sizes = [64, 64, 128]
    for each, pixels in [*zip(options, sizes, strict=True), ({}, 128), ({}, size)]:
        try:
            model = timm.create_model(name, num_classes=CLASSES, **each).eval()
            batch = labelled((3, pixels, pixels))
            with torch.no_grad():
                model(batch[0])
        except Exception:
            if (each, pixels) == ({}, size):
                raise
            continue
        break
    return model, batch


def weights_of_timm(name: str) -> float:
    """Return how many weights a model has, infinitely many where it can't be told."""
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=CLASSES)
    except Exception:
        return float("inf")
    return sum(p.numel() for p in model.parameters())
