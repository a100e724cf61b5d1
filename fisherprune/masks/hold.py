"""How a model and its optimizer keep to masks while they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Hold:
    """Keeps pruned weights at zero until removed; made by ``Masks.hold``."""

    def __init__(
        self,
        model: nn.Module,
        pruned: Mapping[nn.Parameter, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Register all hooks or, where one can't be, none; then set the zeros.

        Args:
            model: has the parameters.
            pruned: inverted masks by parameter, on the parameters' devices.
            optimizer: trains them.
        """
        self._pruned = dict(pruned)
        with ExitStack() as hooks:
            for parameter, out in self._pruned.items():
                hooks.callback(_on_gradient(parameter, _mask_grad(out)).remove)
            for module in model.modules():
                if own := self._own(module):
                    hook = module.register_load_state_dict_post_hook(_AfterLoad(own))
                    hooks.callback(hook.remove)
            after_step = optimizer.register_step_post_hook(lambda *_: self._zero())
            hooks.callback(after_step.remove)
            self._hooks = hooks.pop_all()
        self._zero()
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()  # its history is of all parameters in one vector
        self._zero_state(optimizer)

    def _own(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the inverted masks of a module's own parameters, by attribute."""
        own = module.named_parameters(recurse=False)
        return {name: self._pruned[p] for name, p in own if p in self._pruned}

    @torch.no_grad()
    def _zero(self) -> None:
        for parameter, out in self._pruned.items():
            parameter.masked_fill_(out, 0.0)

    def _zero_state(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, out in self._pruned.items():
            for state in optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == out.shape:
                    state.masked_fill_(out, 0.0)

    def remove(self) -> None:
        """End the hold; may be called again."""
        self._hooks.close()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _on_gradient(
    parameter: nn.Parameter, hook: Callable[[Tensor], None]
) -> RemovableHandle:
    """Register a hook on a gradient; a frozen weight's waits until it is trained."""
    trained = parameter.requires_grad
    parameter.requires_grad_(True)  # torch takes no hook of a frozen weight
    try:
        return parameter.register_post_accumulate_grad_hook(hook)
    finally:
        parameter.requires_grad_(trained)


def _mask_grad(out: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is not None and grad.is_sparse:
            parameter.grad = _mask_rows(grad, out)
        elif grad is not None:
            grad.masked_fill_(out, 0.0)

    return hook


def _mask_rows(grad: Tensor, out: Tensor) -> Tensor:
    """Mask the sparse gradient of an embedding, which holds some of its rows."""
    grad = grad.coalesce()
    rows = grad.indices()[0]
    values = grad.values().masked_fill(out[rows], 0.0)
    return torch.sparse_coo_tensor(
        grad.indices(), values, grad.shape, check_invariants=False, is_coalesced=True
    )


class _AfterLoad:
    """Sets the pruned weights of a module to zero when a state dict was loaded.

    Copies and pickles of a module carry its hooks along, but not what removes them: so
    a copy of this hook does nothing.
    """

    def __init__(self, pruned: Mapping[str, Tensor] | None = None) -> None:
        self._pruned = pruned or {}

    @torch.no_grad()
    def __call__(self, module: nn.Module, _incompatible: object) -> None:
        for name, out in self._pruned.items():
            getattr(module, name).masked_fill_(out, 0.0)

    def __reduce__(self) -> tuple[type[_AfterLoad], tuple[()]]:
        return type(self), ()
