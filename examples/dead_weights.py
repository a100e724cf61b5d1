"""Dead weights: those of a trained network whose F is zero; seconds.

F is the mean of squares, so it is zero where the gradient of every single image is:
weights from pixels that are always black, to and from units that never fire, or between
units that never fire together. A small change of them all changes no output. To remove
them is a large change, after which a unit may fire that did not: that is measured.

    python examples/dead_weights.py
"""

import copy

import torch
from _digits import accuracy, train
from torch import nn

import fisherprune as fp
from fisherprune.data import load

EPOCHS, STEP = 6, 1e-4


def main():
    """Return the masks without dead weights, and what a change of these changes."""
    torch.manual_seed(0)
    parts = load("digits")
    (x, y), test = ((p.images.float() / 255, p.labels) for p in parts)  # black is 0
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    train(model, x, y, EPOCHS)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    fisher = fp.gradient_moments(model, [(x, y)], parameters=weights).fisher
    masks = fp.Masks({name: f > 0 for name, f in fisher.items()})
    moved, pruned = copy.deepcopy(model), copy.deepcopy(model)
    masks.apply_(pruned)
    with torch.no_grad():
        for name, dead in (~masks).items():
            moved.get_parameter(name)[dead] += STEP * torch.randn(int(dead.sum()))
        small, large = (float((m(x) - model(x)).abs().max()) for m in (moved, pruned))
    return masks, small, large, accuracy(model, *test), accuracy(pruned, *test)


if __name__ == "__main__":
    masks, small, large, before, after = main()
    for name, mask in masks.items():
        print(f"{name}: {int((~mask).sum()):5,} of {mask.numel():,} weights are dead")
    print(f"outputs change by {small:.1e} when they move, {large:.1e} without them")
    print(f"test accuracy {before:.1%} before, {after:.1%} after")
