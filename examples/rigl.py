"""RigL: sparse training from scratch whose masks change; runs in seconds.

Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", arXiv 1911.11134.
Every few steps each layer drops its smallest weights and grows as many others, those
with the largest gradients of the dense network.

    python examples/rigl.py
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fisherprune as fp
from fisherprune.data import load

SPARSITY, EPOCHS, BATCH = 0.8, 6, 32
EVERY, SHARE = 8, 0.3  # steps from one change to the next; weights dropped at first
UNTIL = 0.75  # of all steps; then the masks stay


def network():
    """Return a small network for images of 8 x 8 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def largest(scores, counts, among):
    """Keep ``counts`` weights of each layer, those of ``among`` that score highest."""
    sizes = {name: s.numel() for name, s in scores.items()}
    sparsity = 1 - sum(counts.values()) / sum(sizes.values())
    densities = {name: counts[name] / sizes[name] for name in sizes}
    options = {"densities": densities, "among": among, "ties": "position"}
    return fp.select_masks(scores, sparsity, "densities", **options)


def rewired(masks, weights, gradients, share):
    """Return masks that drop a share of each layer's weights and grow as many."""
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    dropped = {name: int(share * n) for name, n in kept.items()}
    if not any(dropped.values()):
        return masks
    sizes = {name: w.abs() for name, w in weights.items()}
    stay = largest(sizes, {n: kept[n] - dropped[n] for n in kept}, masks)
    grown = largest({n: g.abs() for n, g in gradients.items()}, dropped, ~stay)
    return stay | grown


def dense_gradients(model, weights, x, y):
    """Return the gradients of pruned weights, too: a hold masks ``.grad`` alone."""
    found = torch.autograd.grad(cross_entropy(model(x), y), list(weights.values()))
    return dict(zip(weights, found, strict=True))


def main():
    """Train, and return the model, its masks and the test accuracy."""
    torch.manual_seed(0)
    train, test = load("digits")
    x, y = train.normalize(train.images), train.labels
    model = network()
    masks = fp.prune(model, [], "random", SPARSITY, "erk")
    sparse = fp.Masks({name: m for name, m in masks.items() if not m.all()})
    weights = {name: model.get_parameter(name) for name in sparse}
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    hold = sparse.hold(model, optimizer)
    steps, last = 0, UNTIL * EPOCHS * (len(x) // BATCH)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            steps += 1
            if steps % EVERY == 0 and steps < last:  # in place of a step of SGD
                share = SHARE / 2 * (1 + math.cos(math.pi * steps / last))
                gradients = dense_gradients(model, weights, x[rows], y[rows])
                hold.update(rewired(hold.masks, weights, gradients, share))
                continue
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        right = model.eval()(test.normalize(test.images)).argmax(1) == test.labels
    return model, hold.masks, float(right.float().mean())


if __name__ == "__main__":
    model, masks, accuracy = main()
    print(f"{masks}\ntest accuracy {accuracy:.1%}")
