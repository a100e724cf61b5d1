"""Gradual pruning: score again every few epochs and prune a little more; seconds.

The sparsity grows by the cubic schedule of Zhu and Gupta 2017, "To prune, or not to
prune", arXiv 1710.01878: fast at first, while there is much to remove.

    python examples/gradual.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fisherprune as fp
from fisherprune.data import load

SPARSITY, EPOCHS, EVERY, ROUNDS, BATCH = 0.9, 8, 2, 3, 32


def main():
    """Train, and return the model, the masks of all rounds and the test accuracy."""
    torch.manual_seed(0)
    train, test = load("digits")
    x, y = train.normalize(train.images), train.labels
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    whole = {
        n: torch.ones_like(p) > 0 for n, p in fp.prunable_parameters(model).items()
    }
    rounds = [fp.Masks(whole)]
    hold = rounds[0].hold(model, optimizer)
    for epoch in range(1, EPOCHS + 1):
        for rows in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        if epoch % EVERY == 0 and len(rounds) <= ROUNDS:
            sparsity = SPARSITY * (1 - (1 - len(rounds) / ROUNDS) ** 3)
            scores = fp.score(model, train.batches(256), "fts")
            hold.update(fp.select_masks(scores, sparsity, among=hold.masks))
            rounds.append(hold.masks)
    with torch.no_grad():
        right = model.eval()(test.normalize(test.images)).argmax(1) == test.labels
    return model, rounds, float(right.float().mean())


if __name__ == "__main__":
    model, rounds, accuracy = main()
    print(*rounds, f"test accuracy {accuracy:.1%}", sep="\n")
