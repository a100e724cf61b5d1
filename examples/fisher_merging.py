"""Fisher merging: average two fine-tuned models, weighted by what each knows; seconds.

Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", arXiv
2111.09832. Each weight of the merged model is the mean of both, weighted by their
Fisher diagonals; where both are zero, the plain mean. That is not always better: here
the plain average of two models that were tuned on other digits wins.

    python examples/fisher_merging.py
"""

import copy

import torch
from _digits import accuracy, digits, network, sgd, train

import fisherprune as fp

RATE, FLOOR = 0.02, 1e-10  # added to F: what neither model uses is averaged


def merged(models, fishers):
    """Return a model of the weighted means of the weights."""
    result = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, weight in result.named_parameters():
            weighs = [fisher[name] + FLOOR for fisher in fishers]
            weights = [model.get_parameter(name) for model in models]
            total = sum(f * w for f, w in zip(weighs, weights, strict=True))
            weight.copy_(total / sum(weighs))
    return result


def main():
    """Return the test accuracy on all digits, by model."""
    torch.manual_seed(0)
    (x, y), test = digits()
    base, halves = network(), [y < 5, y >= 5]
    train(base, x, y, 1, sgd(base, RATE))
    tuned = [copy.deepcopy(base) for _ in halves]
    for model, h in zip(tuned, halves, strict=True):
        train(model, x[h], y[h], 2, sgd(model, RATE))
    parameters = [dict(model.named_parameters()) for model in tuned]
    fishers = [
        fp.gradient_moments(m, [(x[h], y[h])], labels="sampled", parameters=p).fisher
        for m, h, p in zip(tuned, halves, parameters, strict=True)
    ]
    equal = [{name: torch.ones_like(p) for name, p in base.named_parameters()}] * 2
    models = {
        "tuned on 0-4": tuned[0],
        "tuned on 5-9": tuned[1],
        "plain average": merged(tuned, equal),
        "Fisher average": merged(tuned, fishers),
    }
    return {what: accuracy(model, *test) for what, model in models.items()}


if __name__ == "__main__":
    for what, found in main().items():
        print(f"{what:15} {found:6.1%} of all digits")
