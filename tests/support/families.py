"""Small models of the families in use, built without a network, and data for them."""

from __future__ import annotations

import pytest
import torch
import torchvision
from nets import randomized
from torch import nn

CLASSES, TOKENS = 5, 31


def shaken(model):
    """Move parameters off the numbers near zero or one that they begin with."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return randomized(model).eval()


def images(make, size=32, channels=3):
    """Return the model, and labelled images, in batches of two and of three."""
    shape = (size, size) if isinstance(size, int) else size
    return shaken(make()), [
        (torch.randn(n, channels, *shape), torch.randint(CLASSES, (n,))) for n in (2, 3)
    ]


def residual():
    """Return a ResNet of two stages."""
    block = torchvision.models.resnet.Bottleneck
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], width_per_group=16)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(512, CLASSES)
    return model


def mobilenet():
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    blocks = [
        InvertedResidualConfig(8, 3, 16, 8, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(8, 5, 24, 16, True, "HS", 2, 2, 1.0),
        InvertedResidualConfig(16, 3, 24, 16, False, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(blocks, 24, num_classes=CLASSES)


def efficientnet():
    from torchvision.models.efficientnet import (
        EfficientNet,
        FusedMBConvConfig,
        MBConvConfig,
    )

    blocks = [
        FusedMBConvConfig(2, 3, 2, 8, 8, 1),
        MBConvConfig(4, 3, 1, 8, 8, 2),
        MBConvConfig(4, 5, 2, 8, 16, 1),
    ]
    return EfficientNet(blocks, 0.2, num_classes=CLASSES, last_channel=16)


def convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return ConvNeXt(blocks, num_classes=CLASSES, layer_scale=1.0)


def swin(version):
    from torchvision.models import swin_transformer as lib

    blocks = {
        1: {},
        2: {
            "block": lib.SwinTransformerBlockV2,
            "downsample_layer": lib.PatchMergingV2,
        },
    }
    sizes = [2, 2], 12, [2, 2], [2, 2], [2, 2]
    return lib.SwinTransformer(*sizes, num_classes=CLASSES, **blocks[version])


def video_residual():
    """Return the first layers of a video network."""
    from torchvision.models.video import resnet as lib

    kinds = [lib.Conv2Plus1D, *[lib.Conv3DSimple] * 3]
    net = lib.VideoResNet(lib.BasicBlock, kinds, [1, 1, 1, 1], lib.BasicStem)
    pool = nn.AdaptiveAvgPool3d(1), nn.Flatten()
    return nn.Sequential(net.stem, net.layer1, *pool, nn.Linear(64, CLASSES))


def multiscale_video():
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(2, 8, 8, [3, 3, 3], [1, 2, 2], [1, 1, 1], [3, 3, 3]),
        MSBlockConfig(2, 8, 16, [3, 3, 3], [1, 1, 1], [1, 2, 2], [3, 3, 3]),
    ]
    return MViT(
        (16, 16),
        4,
        blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=CLASSES,
    )


class Segmentation(nn.Module):
    """torchvision's LR-ASPP on a backbone of two layers; a class for each pixel."""

    def __init__(self):
        super().__init__()
        from torchvision.models._utils import IntermediateLayerGetter
        from torchvision.models.segmentation import LRASPP

        layers = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, 2, 1)
        backbone = IntermediateLayerGetter(
            nn.Sequential(*layers), {"1": "low", "2": "high"}
        )
        self.net = LRASPP(backbone, 6, 8, CLASSES, 8)

    def forward(self, x):
        return self.net(x)["out"].mean((2, 3))


class UNet(nn.Module):
    """Down and up again by transposed convolutions, with what was on the way down."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)])
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1),
                nn.ConvTranspose2d(12, 4, 2, 2),
            ]
        )
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Conv2d(4, CLASSES, 1)

    def forward(self, x):
        first = torch.tanh(self.down[0](x))
        below = torch.tanh(self.norm(self.down[1](first)))
        above = torch.cat([torch.tanh(self.up[0](below)), first], 1)
        return self.head(torch.tanh(self.up[1](above))).mean((2, 3))


def vision(name, *args, **options):
    """Return a model of timm."""
    timm = pytest.importorskip("timm")
    path = name.split(".")
    kind = timm.models
    for part in path:
        kind = getattr(kind, part)
    return kind(*args, num_classes=CLASSES, **options)


PATCHES = {"img_size": 16, "patch_size": 8, "embed_dim": 24}


def normalizer_free():
    timm = pytest.importorskip("timm")
    from timm.models.nfnet import NfCfg

    config = NfCfg(
        depths=(1, 1),
        channels=(16, 16),
        stem_type="3x3",
        stem_chs=8,
        group_size=8,
        bottle_ratio=0.5,
        num_features=16,
        act_layer="silu",
        attn_layer="se",
        attn_kwargs={},
    )
    return timm.models.nfnet.NormFreeNet(config, num_classes=CLASSES)


VISION = {
    "resnet": lambda: images(residual),
    "mobilenet_v3": lambda: images(mobilenet),
    "efficientnet": lambda: images(efficientnet),
    "densenet": lambda: images(
        lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=CLASSES)
    ),
    "convnext": lambda: images(convnext),
    "vit": lambda: images(
        lambda: torchvision.models.VisionTransformer(
            16, 8, 2, 2, 24, 40, num_classes=CLASSES
        ),
        16,
    ),
    "swin": lambda: images(lambda: swin(1), 16),
    "swin_v2": lambda: images(lambda: swin(2), 16),
    "maxvit": lambda: images(
        lambda: torchvision.models.MaxVit(
            (16, 16), 8, 2, [8, 8], [1, 1], 4, 0.0, num_classes=CLASSES
        ),
        16,
    ),
    "r3d": lambda: images(video_residual, (2, 8, 8)),
    "mvit": lambda: images(multiscale_video, (4, 16, 16)),
    "lraspp": lambda: images(Segmentation, 16),
    "unet": lambda: images(UNet, 16),
    "timm vit": lambda: images(
        lambda: vision(
            "VisionTransformer", depth=2, num_heads=2, init_values=1.0, **PATCHES
        ),
        16,
    ),
    "timm mixer": lambda: images(
        lambda: vision("mlp_mixer.MlpMixer", num_blocks=2, **PATCHES), 16
    ),
    "timm convnextv2": lambda: images(
        lambda: vision(
            "convnext.ConvNeXt",
            depths=(1, 1, 1, 1),
            dims=(8, 8, 16, 16),
            use_grn=True,
            ls_init_value=None,
        )
    ),
    "timm beit": lambda: images(
        lambda: vision(
            "beit.Beit",
            depth=2,
            num_heads=2,
            use_rel_pos_bias=True,
            init_values=0.5,
            **PATCHES,
        ),
        16,
    ),
    "timm nfnet": lambda: images(normalizer_free),
}
