"""A layer of one's own, and a rule for its per-sample gradients; seconds.

Any function of torch operations has its gradients found, by ``torch.func``. A rule says
how to compute them at once: ``check`` shows the way, and the numbers stay the same.

    python examples/own_layer.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.overrides import handle_torch_function, has_torch_function

import fisherprune as fp


def gated(input, gate):
    """Return ``input * sigmoid(gate)``: input [N, *, F], gate [F]."""
    if has_torch_function((input, gate)):  # so that a rule can stand in its place
        return handle_torch_function(gated, (input, gate), input, gate)
    return input * torch.sigmoid(gate)


class Gate(nn.Module):
    """Lets each of 16 features through as far as it learns to."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(16))

    def forward(self, x):
        """Scale the features."""
        return gated(x, self.gate)


def gated_gradients(grad, input, gate):
    """Return the gradient of each sample: summed over its positions, [N, F]."""
    slope = torch.sigmoid(gate) * torch.sigmoid(-gate)
    return {"gate": fp.Rows((grad * input * slope).flatten(1, -2).sum(1))}


def main():
    """Return the ways before and after the rule, and F with it and of a plain loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Gate(), nn.Flatten(), nn.Linear(80, 3))
    x, y = torch.randn(20, 5, 6), torch.randint(3, (20,))
    before = fp.check(model, (x, y)).ways["1.gate"]
    fp.register_gradients(gated)(gated_gradients)
    moments = fp.gradient_moments(model, [(x, y)], parameters={"1.gate": model[1].gate})
    losses = [cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    rows = [torch.autograd.grad(loss, model[1].gate)[0] for loss in losses]
    loop = torch.stack(rows).square().mean(0)
    return before, moments.paths["1.gate"], moments.fisher["1.gate"], loop


if __name__ == "__main__":
    before, after, fisher, loop = main()
    print(f"way of the gate: {', '.join(before)}; with its rule: {', '.join(after)}")
    print(f"largest difference from a loop: {float((fisher - loop).abs().max()):.1e}")
