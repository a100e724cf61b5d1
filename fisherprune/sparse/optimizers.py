"""Optimizers whose parameters are replaced: what they remember goes along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.masks.optimizers import check_trains, trained, unwrapped
from fisherprune.parameters import checked_model
from fisherprune.sparse.base import SparseLayer


class Replacement(NamedTuple):
    """A parameter that takes the place of another."""

    old: nn.Parameter
    new: nn.Parameter
    names: tuple[str, str]
    """Of both, the old one's first."""
    move: Callable[[Tensor], Tensor]
    """From what has the old one's shape to what has the new one's."""


class Conversion:
    """New states of an optimizer, found before anything is changed.

    Args:
        optimizer: of torch.optim, or one that has it among its attributes.
        replacements: of its parameters.
        where: the function, for messages.

    Raises:
        FisherpruneError: where it is none, does not train all old parameters that are
            trained, or remembers what can't be divided among weights.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        replacements: list[Replacement],
        where: str,
    ) -> None:
        self._new = {id(r.old): r for r in replacements}
        self._optimizers = list(unwrapped(optimizer))
        self._states: list[tuple[MutableMapping, Replacement, object]] = []
        if optimizer is None:
            return
        check_trains(optimizer, {r.names[0]: r.old for r in replacements}, where)
        for one in self._optimizers:
            if isinstance(one, torch.optim.LBFGS):
                wanted = "one that remembers each parameter by itself"
                raise FieldError(f"{where}: optimizer", wanted, "LBFGS")
            for states in vars(one).values():
                if isinstance(states, MutableMapping):
                    for r in replacements:
                        if r.old in states:
                            state = _moved(states[r.old], r, where)
                            self._states.append((states, r, state))

    def carry_out(self) -> None:
        """Replace the parameters in the groups, and their states."""
        for one in self._optimizers:
            for group in getattr(one, "param_groups", ()):
                params, names = group["params"], group.get("param_names")
                for i, parameter in enumerate(params):
                    if (r := self._new.get(id(parameter))) is not None:
                        params[i] = r.new
                        if names is not None:
                            old, new = (name.rpartition(".")[2] for name in r.names)
                            names[i] = names[i].removesuffix(old) + new
        for states, r, state in self._states:
            if states.pop(r.old, None) is not None:  # wrappers share their states
                states[r.new] = state


def _moved(state: object, r: Replacement, where: str) -> object:
    """Return a parameter's state: a tensor, or a dict of tensors and numbers."""
    if isinstance(state, Mapping):
        return {key: _moved_entry(key, v, r, where) for key, v in state.items()}
    return _moved_entry("state", state, r, where)


def _moved_entry(key: object, value: object, r: Replacement, where: str) -> object:
    if isinstance(value, Tensor):
        if value.shape == r.old.shape:
            return r.move(value)
        if value.dim() == 0:
            return value  # counts of steps
        got: object = list(value.shape)
    elif value is None or isinstance(value, bool | int | float | str):
        return value
    else:
        got = shown(value)
    raise FieldError(
        f"{where}: the optimizer's {key!r} of {r.names[0]!r}",
        f"a number or a tensor of the weight's shape {list(r.old.shape)}",
        got,
    )


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """Yield the sparse layers of a model by name, each once."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            yield name, module


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that does not train a compressed model's kept weights.

    One that was made before ``compress`` goes on with parameters that the model has no
    more: its steps change nothing, and nothing says so. Give it to ``compress``, or
    make it afterwards.

    Args:
        model: a model of ``compress``.
        optimizer: of torch.optim, or one that has it among its attributes.

    Raises:
        FisherpruneError: where ``values`` of a sparse layer that are trained are not
            among its parameters.

    Example:
        >>> import torch
        >>> from fisherprune.sparse import compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mask = torch.tensor([[True, False, False], [False, False, False]])
        >>> model = compress(model, {"0.weight": mask}, optimizer=optimizer)
        >>> check_optimizer(model, optimizer)
        >>> optimizer.param_groups[0]["params"][0] is model[0].values
        True
    """
    checked_model(model)
    if not isinstance(optimizer, Optimizer):
        wanted = "of torch.optim"
        raise FieldError("check_optimizer: optimizer", wanted, shown(optimizer))
    known = {id(p) for one in unwrapped(optimizer) for p in trained(one)}
    for name, layer in sparse_layers(model):
        if layer.values.requires_grad and id(layer.values) not in known:
            raise FisherpruneError(
                f"check_optimizer: optimizer must train '{name}.values', but does not: "
                "give it to compress(..., optimizer=optimizer), or make it afterwards"
            )
