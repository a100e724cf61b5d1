"""Prune a vision transformer at initialization, and train what is left; seconds.

``modules`` chooses the attention's weights too, which are no Linear layer's.

    python examples/prune_vit.py
"""

import torch
from _digits import accuracy, digits, train
from torch import nn
from torchvision.models import VisionTransformer

import fisherprune as fp

SPARSITY, EPOCHS = 0.8, 5


def main():
    """Return the model, its masks and the test accuracy."""
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = digits()
    model = VisionTransformer(
        image_size=8,
        patch_size=2,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=10,
    )
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zeros pass no gradient on
    x, x_test = (images.expand(-1, 3, -1, -1) for images in (x, x_test))
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    weights = fp.prunable_parameters(model, modules=kinds)
    masks = fp.prune(model, [(x, y)], "fts", SPARSITY, "erk", parameters=weights)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    masks.hold(model, optimizer)
    train(model, x, y, EPOCHS, optimizer)
    return model, masks, accuracy(model.eval(), x_test, y_test)


if __name__ == "__main__":
    model, masks, found = main()
    for name, mask in masks.items():
        print(f"{name:60} {float(mask.float().mean()):6.1%} kept")
    print(f"test accuracy {found:.1%}")
