"""Elastic weight consolidation: learn a second task and keep the first; seconds.

Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks",
arXiv 1612.00796. The penalty is lambda / 2 times the sum of F (w - w1)^2, with w1 the
weights after the first task and F its Fisher diagonal.

    python examples/elastic_weight_consolidation.py
"""

import copy

import torch
from _digits import accuracy, digits, network, sgd, train

import fisherprune as fp

EPOCHS, RATE, STRENGTH = 4, 0.01, 1000.0


def tasks():
    """Return training and test data of two tasks: which of 0-4, and which of 5-9."""
    parts = digits()
    first = [(x[y < 5], y[y < 5]) for x, y in parts]
    return first, [(x[y >= 5], y[y >= 5] - 5) for x, y in parts]


def consolidation(model, fisher, strength):
    """Return the penalty for leaving the model's present weights."""
    start = {name: model.get_parameter(name).detach().clone() for name in fisher}

    def penalty(model):
        steps = {n: model.get_parameter(n) - w for n, w in start.items()}
        return strength / 2 * sum((fisher[n] * d**2).sum() for n, d in steps.items())

    return penalty


def main():
    """Return the test accuracy on both tasks, by what happened."""
    torch.manual_seed(0)
    (first, first_test), (second, second_test) = tasks()
    model = train(network(5), *first, EPOCHS)
    options = {"labels": "sampled", "parameters": dict(model.named_parameters())}
    moments = fp.gradient_moments(model, [first], **options)
    penalty = consolidation(model, moments.fisher, STRENGTH)
    plain, kept = copy.deepcopy(model), copy.deepcopy(model)
    train(plain, *second, EPOCHS, sgd(plain, RATE))
    train(kept, *second, EPOCHS, sgd(kept, RATE), penalty)
    models = {"first task": model, "then second": plain, "then second, EWC": kept}
    return {
        what: (accuracy(m, *first_test), accuracy(m, *second_test))
        for what, m in models.items()
    }


if __name__ == "__main__":
    print(f"{'trained on':18} {'0-4':>6} {'5-9':>6}")
    for what, (first, second) in main().items():
        print(f"{what:18} {first:6.1%} {second:6.1%}")
