"""How a model and its optimizer keep to masks while they train."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.parameters import WRAPPERS

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a weight: the integers that have its bits."""


_Own = dict[str, nn.Parameter]
"""Held parameters of a module, by attribute."""


class Hold:
    """Keeps pruned weights at zero until removed; made by ``Masks.hold``.

    The hooks of optimizers and parameters know it by a weak reference, those of the
    model own it: it ends with the model, if it is not removed before.
    """

    def __init__(
        self,
        model: nn.Module,
        pruned: Mapping[str, tuple[nn.Parameter, Tensor]],
        optimizer: Optimizer | None = None,
    ) -> None:
        """Register all hooks or, where one can't be, none; then set the zeros.

        Args:
            model: has the parameters.
            pruned: parameters and their inverted masks, by name.
            optimizer: trains them.

        Raises:
            FisherpruneError: where ``optimizer`` is none, or does not train them.
        """
        if optimizer is not None:
            _check_trains(optimizer, {name: p for name, (p, _) in pruned.items()})
        self._masks: dict[Tensor, _Mask] = {}
        self._hooks = ExitStack()
        optimizers = list(_unwrapped(optimizer))
        with ExitStack() as undo:
            undo.callback(self.remove)
            for parameter, out in pruned.values():
                self._take(parameter, out)
            self._hook_modules(model)
            self._hook_steps(optimizers)
            undo.pop_all()
        self.zero()
        for one in optimizers:
            self._clean(one)

    def _take(self, parameter: nn.Parameter, out: Tensor) -> None:
        """Hold one more parameter."""
        self._masks[parameter] = _Mask.of(out, parameter)
        hold = weakref.ref(self)

        def on_gradient(parameter: Tensor) -> None:
            if (held := hold()) is not None:
                held._mask_gradient(parameter)

        self._hooks.callback(_on_gradient(parameter, on_gradient).remove)

    def _hook_modules(self, model: nn.Module) -> None:
        for module in _whole(model):
            hook = _ModuleHook(self._before_forward)
            handle = module.register_forward_pre_hook(hook, prepend=True)
            self._hooks.callback(handle.remove)
        for module in model.modules():
            own = {n: p for n, p in module._parameters.items() if p in self._masks}
            if own:
                hook = _ModuleHook(partial(self._after_load, own))
                handle = module.register_load_state_dict_post_hook(hook)
                self._hooks.callback(handle.remove)
                hook = _ModuleHook(partial(self._before_save, own))
                handle = module.register_state_dict_pre_hook(hook)
                self._hooks.callback(handle.remove)

    def _hook_steps(self, optimizers: Iterable[Optimizer]) -> None:
        """Register hooks of any optimizer's steps, and first on the known ones.

        An optimizer's own hooks run before those of all optimizers: so its later hooks,
        which copy the weights for instance, find zeros, and what they write is zeroed.
        """
        hold = weakref.ref(self)

        def after_step(optimizer: Optimizer, *_: object) -> None:
            if (held := hold()) is not None:
                held._after_step(optimizer)

        for optimizer in optimizers:
            if hasattr(optimizer, "_optimizer_step_post_hooks"):
                handle = optimizer.register_step_post_hook(after_step)
                self._hooks.callback(handle.remove)
        of_all = register_optimizer_step_post_hook(after_step)
        self._hooks.callback(weakref.finalize(self, of_all.remove))

    def _before_forward(self, _: nn.Module) -> None:
        if not (torch.compiler.is_compiling() or torch._C._get_tracing_state()):
            self.zero()

    def _before_save(self, own: _Own, _: nn.Module) -> None:
        self.zero(own.values())

    def _after_load(self, own: _Own, module: nn.Module) -> None:
        """Set zeros; ``load_state_dict(assign=True)`` has put in other parameters."""
        for name, parameter in own.items():
            loaded = module._parameters[name]
            if loaded is not None and loaded not in self._masks:
                self._take(loaded, self._masks[parameter].pruned)
                own[name] = loaded
        self.zero(own.values())

    def _after_step(self, optimizer: Optimizer) -> None:
        self.zero(p for p in _trained(optimizer) if p in self._masks)

    def zero(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Set the pruned weights to zero, in few kernels: of all parameters, or some.

        The bits of a weight are multiplied by 0 or 1 as an integer: that makes NaN,
        infinities and negative numbers +0, too. Autograd does not see it: after the
        first time zeros are written over zeros.
        """
        bits, kept = [], []
        for parameter in self._masks if parameters is None else parameters:
            weight, mask = parameter.data, self._mask(parameter)
            if mask.kept is None:
                weight.masked_fill_(mask.pruned, 0.0)
            else:
                bits.append(weight.view(mask.kept.dtype))
                kept.append(mask.kept)
        if bits:
            torch._foreach_mul_(bits, kept)

    def _mask(self, parameter: Tensor) -> _Mask:
        """Return the parameter's mask as it is now: ``model.to`` may have moved it."""
        mask = self._masks[parameter]
        if not mask.fits(parameter):
            mask = self._masks[parameter] = _Mask.of(mask.pruned, parameter)
        return mask

    def _mask_gradient(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:  # an earlier hook has used it up
            return
        if grad.is_sparse:
            parameter.grad = _mask_rows(grad, self._mask(parameter).pruned)
        else:
            grad.masked_fill_(self._mask(parameter).pruned, 0.0)

    def _clean(self, optimizer: Optimizer) -> None:
        """Set to zero what an optimizer remembers of pruned weights."""
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()  # its history is of all parameters in one vector
        states = [s for s in vars(optimizer).values() if isinstance(s, Mapping)]
        for parameter, mask in self._masks.items():
            for tensor in _tensors(s.get(parameter) for s in states):
                if tensor.shape == mask.pruned.shape:
                    tensor.masked_fill_(mask.pruned.to(tensor.device), 0.0)

    def remove(self) -> None:
        """End the hold; may be called again."""
        self._hooks.close()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Mask(NamedTuple):
    """A mask in the forms that are used, each as its parameter lies in memory."""

    pruned: Tensor
    kept: Tensor | None
    """1 where kept, as integers of the weight's size; None: there are none so large."""

    @classmethod
    def of(cls, pruned: Tensor, parameter: Tensor) -> _Mask:
        weight, dtype = parameter.data, INTEGERS.get(parameter.element_size())
        out = torch.empty_like(weight, dtype=torch.bool).copy_(pruned)
        kept = None if dtype is None else torch.empty_like(weight, dtype=dtype)
        return cls(out, None if kept is None else kept.copy_(~out))

    def fits(self, parameter: Tensor) -> bool:
        """Return whether the parameter lies as it did."""
        size = 0 if self.kept is None else self.kept.element_size()
        return (
            INTEGERS.get(parameter.element_size()) == INTEGERS.get(size)
            and self.pruned.device == parameter.device
            and self.pruned.stride() == parameter.stride()
        )


class _ModuleHook:
    """A hook of a module, of any kind: calls ``action(module)``.

    Copies and pickles of a module carry its hooks along, but not what removes them: so
    a copy of this hook does nothing.
    """

    def __init__(self, action: Callable[[nn.Module], None] | None = None) -> None:
        self._action = action

    def __call__(self, module: nn.Module, *_: object) -> None:
        if self._action is not None:
            self._action(module)

    def __reduce__(self) -> tuple[type[_ModuleHook], tuple[()]]:
        return type(self), ()


def _whole(model: nn.Module) -> list[nn.Module]:
    """Return the model and, where it is a wrapper, what it wraps."""
    return [
        module
        for name, module in model.named_modules()
        if not name or all(part in WRAPPERS for part in name.split("."))
    ]


def _unwrapped(optimizer: Optimizer | None) -> Iterator[Optimizer]:
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


def _trained(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in getattr(optimizer, "param_groups", ()):
        yield from group["params"]


def _check_trains(optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse what is no optimizer, or trains not all the weights that are trained."""
    if not isinstance(optimizer, Optimizer):
        raise FieldError("hold: optimizer", "of torch.optim", shown(optimizer))
    trained = {id(p) for one in _unwrapped(optimizer) for p in _trained(one)}
    for name, weight in weights.items():
        if weight.requires_grad and id(weight) not in trained:
            raise FisherpruneError(f"hold: the optimizer does not train {name!r}")


def _tensors(states: Iterable[object]) -> Iterator[Tensor]:
    """Yield the tensors of a parameter's states: tensors, or dicts of them."""
    for state in states:
        values = state.values() if isinstance(state, Mapping) else [state]
        yield from (v for v in values if isinstance(v, Tensor))


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


def _mask_rows(grad: Tensor, out: Tensor) -> Tensor:
    """Mask the sparse gradient of an embedding, which holds some of its rows."""
    grad = grad.coalesce()
    rows = grad.indices()[0]
    values = grad.values().masked_fill(out[rows], 0.0)
    return torch.sparse_coo_tensor(
        grad.indices(), values, grad.shape, check_invariants=False, is_coalesced=True
    )
