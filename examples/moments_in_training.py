"""A running Fisher diagonal beside a training that goes on as ever; seconds.

Adaptive optimizers divide by a running average of the squared gradient of a batch. Its
noise is in it, and the squares of single samples are not. This one averages the exact
F of each batch, v = b v + (1 - b) F, corrected for its begin at zero as in Adam (Kingma
and Ba 2015, arXiv 1412.6980), and compares it with a pass over all images at the end.

    python examples/moments_in_training.py
"""

import torch
from _digits import accuracy, digits, network, sgd
from torch.nn.functional import cross_entropy

import fisherprune as fp

EPOCHS, DECAY, BATCH = 3, 0.98, 64


def averaged(average, fisher, decay=DECAY):
    """Return the running averages with one more F, by name."""
    if not average:
        average = {name: torch.zeros_like(f) for name, f in fisher.items()}
    return {n: decay * a + (1 - decay) * fisher[n] for n, a in average.items()}


def likeness(a, b):
    """Return the cosine of the angle between two diagonals."""
    a, b = (torch.cat([d[n].flatten() for n in a]) for d in (a, b))
    return float(torch.nn.functional.cosine_similarity(a, b, 0))


def main():
    """Return the test accuracy, and how like the pass over all images both are."""
    torch.manual_seed(0)
    (x, y), test = digits()
    model, fisher, squares, steps = network(), {}, {}, 0
    optimizer, moments = sgd(model), fp.moments(model)  # once, before the loop
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            with moments:
                cross_entropy(model(x[rows]), y[rows]).backward()
            found = moments.result()
            fisher = averaged(fisher, found.fisher)
            squares = averaged(squares, {n: m**2 for n, m in found.mean.items()})
            optimizer.step()
            steps += 1
    start = 1 - DECAY**steps
    fisher, squares = ({n: a / start for n, a in d.items()} for d in (fisher, squares))
    exact = fp.gradient_moments(model, [(x, y)]).fisher
    return accuracy(model, *test), likeness(fisher, exact), likeness(squares, exact)


if __name__ == "__main__":
    found, ours, adam = main()
    print(f"test accuracy {found:.1%}")
    print(f"F of single samples, averaged: cosine to the exact one {ours:.3f}")
    print(f"squared gradients of batches:  cosine to the exact one {adam:.3f}")
