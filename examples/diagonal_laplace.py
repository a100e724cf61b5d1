"""Diagonal Laplace approximation: a network that knows when it does not know; seconds.

MacKay 1992, "A Practical Bayesian Framework for Backpropagation Networks"; Ritter et
al. 2018, "A Scalable Laplace Approximation for Neural Networks". The posterior of the
weights is a normal distribution around the trained ones, of precision N F + prior.

    python examples/diagonal_laplace.py
"""

import torch
from _digits import accuracy, digits, network, train
from torch.nn.functional import nll_loss
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.special import entr

import fisherprune as fp

EPOCHS, PRIOR, DRAWS = 8, 300.0, 50


@torch.no_grad()
def averaged(model, variance, x, draws):
    """Return the mean class probabilities over weights drawn from the posterior."""
    parameters = list(model.parameters())
    mean, total = parameters_to_vector(parameters), 0.0
    for _ in range(draws):
        drawn = mean + variance.sqrt() * torch.randn_like(mean)
        vector_to_parameters(drawn, parameters)
        total = total + model(x).softmax(1)
    vector_to_parameters(mean, parameters)
    return total / draws


def main():
    """Return the test accuracy and, of both, the mean loss and entropies in nats."""
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = digits()
    model = train(network(), x, y, EPOCHS)
    every = dict(model.named_parameters())
    moments = fp.gradient_moments(model, [(x, y)], labels="sampled", parameters=every)
    fisher = parameters_to_vector(moments.fisher.values())
    variance = 1 / (len(x) * fisher + PRIOR)
    found = {"test accuracy": accuracy(model, x_test, y_test)}
    noise = torch.randn_like(x_test) * x_test.std()  # images of no digit
    for what, images in (("noise", noise), ("test", x_test)):
        with torch.no_grad():
            both = model(images).softmax(1), averaged(model, variance, images, DRAWS)
        found[f"entropy, {what}"] = [float(entr(p).sum(1).mean()) for p in both]
    found["loss, test"] = [float(nll_loss(p.log(), y_test)) for p in both]
    return found


if __name__ == "__main__":
    found = main()
    print(f"test accuracy {found.pop('test accuracy'):.1%}")
    for what, (one, mean) in found.items():
        print(f"{what:15} trained weights {one:.3f}, posterior {mean:.3f}")
