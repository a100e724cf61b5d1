"""What a hold asks of optimizers: which weights they train, and what they remember."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.shards import local


def unwrapped(optimizer: Optimizer | None) -> Iterator[Optimizer]:
    """Yield an optimizer and those in its attributes, and in theirs, each once."""
    found, left = set[int](), [optimizer]
    while left:
        one = left.pop()
        if isinstance(one, Optimizer) and id(one) not in found:
            found.add(id(one))
            yield one
            for value in vars(one).values():
                values = value.values() if isinstance(value, dict) else value
                several = isinstance(value, dict | list | tuple)
                left += values if several else [value]


def trained(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the parameters that an optimizer trains."""
    for group in getattr(optimizer, "param_groups", ()):
        yield from group["params"]


def check_trains(
    optimizer: Optimizer, weights: Mapping[str, nn.Parameter], where: str = "hold"
) -> None:
    """Refuse what is no optimizer, or trains not all the weights that are trained."""
    if not isinstance(optimizer, Optimizer):
        raise FieldError(f"{where}: optimizer", "of torch.optim", shown(optimizer))
    known = {id(p) for one in unwrapped(optimizer) for p in trained(one)}
    for name, weight in weights.items():
        if weight.requires_grad and id(weight) not in known:
            raise FisherpruneError(
                f"{where}: the optimizer does not train {name!r}: make it of this "
                "model's parameters; one that trains a part of them takes the masks of "
                "these, Masks({name: masks[name] for name in names})"
            )


def clean(optimizer: Optimizer, out: Mapping[Tensor, Tensor]) -> None:
    """Set to zero what an optimizer remembers of weights, those of bool tensors."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()  # its history is of all parameters in one vector
    states = [s for s in vars(optimizer).values() if isinstance(s, Mapping)]
    for parameter, mask in out.items():
        for tensor in _tensors(s.get(parameter) for s in states):
            here = local(tensor)
            if here.shape == mask.shape:
                here.masked_fill_(mask.to(here.device), 0.0)


def _tensors(states: Iterable[object]) -> Iterator[Tensor]:
    """Yield the tensors of a parameter's states: tensors, or dicts of them."""
    for state in states:
        values = state.values() if isinstance(state, Mapping) else [state]
        yield from (v for v in values if isinstance(v, Tensor))
