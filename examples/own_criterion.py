"""A criterion of one's own: a formula of weights and statistics; seconds.

Here the signal to noise ratio of the gradient, times the weight: registered, it works
with every scope, schedule and structure, as the built-in ones do.

    python examples/own_criterion.py
"""

import torch
from _digits import accuracy, digits, network, sgd, train

import fisherprune as fp

SPARSITY, EPOCHS = 0.95, 6


@fp.register_criterion("moments")
def steady(s):
    """``|w m| / sqrt(F)``: what counts is a gradient that all images agree on."""
    return torch.where(s.F > 0, (s.w * s.m).abs() / s.F.sqrt(), 0)


def main():
    """Return the test accuracy after pruning at initialization, by criterion."""
    (x, y), test = digits()
    found = {}
    for criterion in ("random", "snip", "fts", "steady"):
        torch.manual_seed(0)  # the same start
        model = network()
        masks = fp.prune(model, [(x, y)], criterion, SPARSITY)
        optimizer = sgd(model)
        masks.hold(model, optimizer)
        train(model, x, y, EPOCHS, optimizer)
        found[criterion] = accuracy(model, *test)
    return found


if __name__ == "__main__":
    for criterion, found in main().items():
        print(f"{criterion:8} {found:6.1%} at sparsity {SPARSITY:.0%}")
