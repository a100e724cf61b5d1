"""Which layer bears quantization worst: predicted from F, then measured; seconds.

Dong et al. 2019, "HAWQ: Hessian AWare Quantization", arXiv 1905.03696, with the Fisher
diagonal as the Hessian's. Rounding changes weights by delta, and the loss by about the
sum of m delta + F delta^2 / 2, of which the layer with the largest needs more bits.

    python examples/layer_sensitivity.py
"""

import copy

import torch
from _digits import digits, network, train
from torch.nn.functional import cross_entropy

import fisherprune as fp

EPOCHS, BITS = 4, 3


def rounded(weight, bits):
    """Return a weight rounded to ``2**bits - 1`` steps between -max and max."""
    step = weight.abs().max() / (2 ** (bits - 1) - 0.5)
    return (weight / step).round() * step


@torch.no_grad()
def main():
    """Return the predicted and the measured increase of the loss, by layer."""
    torch.manual_seed(0)
    (x, y), _ = digits()
    with torch.enable_grad():
        model = train(network(), x, y, EPOCHS)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    options = {"labels": "sampled", "draws": 4, "parameters": weights}
    moments = fp.gradient_moments(model, [(x, y)], **options)
    before, found = cross_entropy(model(x), y), {}
    for name, weight in weights.items():
        delta = rounded(weight, BITS) - weight
        first = (moments.mean[name] * delta).sum()
        second = (moments.fisher[name] * delta**2).sum() / 2
        changed = copy.deepcopy(model)
        changed.get_parameter(name).add_(delta)
        found[name] = (
            float(first + second),
            float(cross_entropy(changed(x), y) - before),
        )
    return found


if __name__ == "__main__":
    print(f"{BITS} bits     predicted  measured increase of the loss")
    for name, (predicted, measured) in main().items():
        print(f"{name:10} {predicted:9.5f} {measured:9.5f}")
