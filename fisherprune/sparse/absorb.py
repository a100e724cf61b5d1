"""What layers take up of constant channels that go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherprune.modules import TRANSPOSED
from fisherprune.sparse.channels import by_input, folds
from fisherprune.sparse.graph import Graph


@torch.no_grad()
def absorb(graph: Graph) -> None:
    """Let biases, and weights of channels that carry, stand for what goes."""
    sums = dict[nn.Module, Tensor]()
    for coupled in graph.coupled:
        for module, channels in coupled.channels(coupled.inputs).items():
            if module not in graph.rules.reads:
                continue
            constants = graph.rules.constants(module)
            going = torch.zeros_like(constants, dtype=torch.bool)
            going[sorted(channels)] = True
            values = constants.where(going, 0.0)
            if folds(module):
                sums[module] = sums.get(module, 0.0) + values
            elif coupled.carrier is not None and values.any():
                claims = coupled.inputs[module].items()
                carrier = next(i for i, roots in claims if coupled.carrier in roots)
                _carry(module, values / constants[carrier], carrier)
    for module, values in sums.items():
        if values.any():
            _add_to_bias(module, values)


def _add_to_bias(module: Any, constants: Tensor) -> None:
    added = by_input(module, module.weight) @ constants
    if module.bias is None:
        module.bias = nn.Parameter(added)
    else:
        module.bias += added


def _carry(module: Any, shares: Tensor, carrier: int) -> None:
    """Add the weights of input channels to those of one; so its mask keeps them all."""
    dim = 0 if isinstance(module, TRANSPOSED) else 1
    shape = [-1 if d == dim else 1 for d in range(module.weight.dim())]
    weight, mask = module.weight, module.weight.grad
    weight.select(dim, carrier).add_((weight * shares.view(shape)).sum(dim))
    if mask is not None:
        chosen = (mask * (shares != 0).view(shape)).sum(dim)
        mask.select(dim, carrier).add_(chosen)
