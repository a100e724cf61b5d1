"""How a model and its optimizer keep to masks while they train."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.masks.optimizers import check_trains, clean, trained, unwrapped
from fisherprune.parameters import WRAPPERS, fitted_names
from fisherprune.shards import as_shard, local, split_like

if TYPE_CHECKING:
    from fisherprune.masks.masks import Masks

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
            check_trains(optimizer, {name: p for name, (p, _) in pruned.items()})
        self._masks: dict[Tensor, _Mask] = {}
        self._names: dict[Tensor, str] = {}
        self._released: list[str] = []
        self._hooks, self._ended = ExitStack(), False
        optimizers = list(unwrapped(optimizer))
        self._optimizers = [weakref.ref(one) for one in optimizers]
        with ExitStack() as undo:
            undo.callback(self.remove)
            _HOLDS.add(self)
            for name, (parameter, out) in pruned.items():
                self._take(name, parameter, out)
            self._hook_modules(model)
            self._hook_steps(optimizers)
            undo.pop_all()
        self.zero()
        self._clean({p: mask.pruned for p, mask in self._masks.items()})

    @property
    def masks(self) -> Masks:
        """Return the masks that are held, in new tensors, by the names they came by."""
        pruned = {p: self._masks[p].pruned for p in self._names}
        return _masks({n: as_shard(~pruned[p], p) for p, n in self._names.items()})

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Go on with other masks, for schedules that prune more or let weights return.

        Weights that are pruned from now on become zero, as do their gradients and
        optimizer state. Weights that come back begin at zero with zero optimizer state,
        as they do in RigL (Evci et al. 2020, arXiv 1911.11134): to begin elsewhere, set
        them after the update. No other weight changes, nor its state.

        The state of an optimizer is cleaned where the hold was given it. To resume
        later, save ``hold.masks`` beside the states of model and optimizer, and hold
        them anew.

        Args:
            masks: bool tensors of the same parameters and shapes as those held.

        Raises:
            FisherpruneError: where they are not, the hold has ended, or
                ``sparse.compress`` has replaced one of the parameters by its kept
                values; nothing is changed then.

        Example:
            >>> import torch
            >>> from fisherprune import Masks
            >>> layer = torch.nn.Linear(2, 1)
            >>> hold = Masks({"weight": torch.tensor([[True, True]])}).hold(layer)
            >>> hold.update({"weight": torch.tensor([[True, False]])})
            >>> layer.weight[0, 1].item(), hold.masks.kept()
            (0.0, 1)
        """
        given = _masks(masks)
        new = self._fitted(given)
        either = {p: self._mask(p).pruned | mask.pruned for p, mask in new.items()}
        given._warn_of_collapse()
        self._masks |= new
        for parameter, out in either.items():
            local(parameter.data).masked_fill_(out, 0.0)
            self._mask_gradient(parameter)
        self._clean(either)

    def _fitted(self, masks: Masks) -> dict[Tensor, _Mask]:
        """Return masks of the held parameters, in the forms that are used."""
        if self._released:
            raise FisherpruneError(
                "update: the held parameters must be the model's, but sparse.compress "
                f"has replaced {self._released[0]!r}: decompress the model, hold the "
                "other masks and compress it anew"
            )
        if self._ended:
            raise FisherpruneError("update: the hold must not have ended, but it has")
        held = dict.fromkeys(self._names.values())
        names = fitted_names(held, masks)
        if names is None or len(masks) != len(held):
            odd = ", ".join(map(repr, sorted(masks.keys() ^ held.keys())[:3]))
            wanted = f"of the {len(held)} held parameters"
            raise FieldError("update: masks", wanted, f"{odd} in one of them alone")
        for parameter, name in self._names.items():
            shape = list(masks[names[name]].shape)
            if shape != list(parameter.shape):
                wanted = f"of shape {list(parameter.shape)}"
                raise FieldError(f"update: mask of {name!r}", wanted, shape)
        fitted = {
            p: local(split_like(masks[names[n]], p, f"update: mask of {n!r}"))
            for p, n in self._names.items()
        }
        return {p: _Mask.of(~mask, p) for p, mask in fitted.items()}

    def keeps(self, parameter: Tensor, pruned: Tensor) -> bool:
        """Return whether the hold lasts and keeps just these weights at zero."""
        if self._ended or parameter not in self._masks:
            return False
        return torch.equal(self._mask(parameter).pruned, pruned)

    def release(self, parameters: Iterable[Tensor]) -> None:
        """Hold these parameters no more, which are no longer those of the model."""
        for parameter in parameters:
            if self._masks.pop(parameter, None) is not None:
                self._released.append(self._names.pop(parameter))

    def _take(self, name: str, parameter: nn.Parameter, out: Tensor) -> None:
        """Hold one more parameter."""
        self._masks[parameter] = _Mask.of(out, parameter)
        self._names[parameter] = name
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
        self.zero(p for p in own.values() if p in self._masks)

    def _after_load(self, own: _Own, module: nn.Module) -> None:
        """Set zeros; ``load_state_dict(assign=True)`` has put in other parameters."""
        for name, parameter in own.items():
            if parameter not in self._masks:
                continue
            loaded = module._parameters[name]
            if loaded is not None and loaded not in self._masks:
                pruned = self._masks[parameter].pruned
                self._take(self._names[parameter], loaded, pruned)
                own[name] = loaded
        self.zero(p for p in own.values() if p in self._masks)

    def _after_step(self, optimizer: Optimizer) -> None:
        self.zero(p for p in trained(optimizer) if p in self._masks)

    def zero(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Set the pruned weights to zero, in few kernels: of all parameters, or some.

        The bits of a weight are multiplied by 0 or 1 as an integer: that makes NaN,
        infinities and negative numbers +0, too. Autograd does not see it: after the
        first time zeros are written over zeros.
        """
        bits, kept = [], []
        for parameter in self._masks if parameters is None else parameters:
            weight, mask = local(parameter.data), self._mask(parameter)
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
        if grad is None or parameter not in self._masks:
            return  # an earlier hook has used it up, or it was released
        if grad.is_sparse:
            parameter.grad = _mask_rows(grad, self._mask(parameter).pruned)
        else:
            local(grad).masked_fill_(self._mask(parameter).pruned, 0.0)

    def _clean(self, out: Mapping[Tensor, Tensor]) -> None:
        """Set to zero what the optimizers remember of weights, by parameter."""
        for optimizer in filter(None, (one() for one in self._optimizers)):
            clean(optimizer, out)

    def remove(self) -> None:
        """End the hold; may be called again."""
        self._hooks.close()
        self._ended = True

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


_HOLDS: weakref.WeakSet[Hold] = weakref.WeakSet()


def lasting_holds() -> list[Hold]:
    """Return the holds that have not ended, of all models."""
    return [hold for hold in _HOLDS if not hold._ended]


class _Mask(NamedTuple):
    """A mask in the forms that are used, each as its parameter lies in memory."""

    pruned: Tensor
    kept: Tensor | None
    """1 where kept, as integers of the weight's size; None: there are none so large."""

    @classmethod
    def of(cls, pruned: Tensor, parameter: Tensor) -> _Mask:
        weight = local(parameter.data)
        dtype = INTEGERS.get(weight.element_size())
        out = torch.empty_like(weight, dtype=torch.bool).copy_(pruned)
        kept = None if dtype is None else torch.empty_like(weight, dtype=dtype)
        return cls(out, None if kept is None else kept.copy_(~out))

    def fits(self, parameter: Tensor) -> bool:
        """Return whether the parameter lies as it did."""
        size = 0 if self.kept is None else self.kept.element_size()
        weight = local(parameter)
        return (
            INTEGERS.get(weight.element_size()) == INTEGERS.get(size)
            and self.pruned.device == weight.device
            and self.pruned.stride() == weight.stride()
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


def _masks(masks: Mapping[str, Tensor]) -> Masks:
    """Return ``masks`` as ``Masks``, whose file imports this one."""
    from fisherprune.masks.masks import Masks

    return masks if isinstance(masks, Masks) else Masks(masks)


def _whole(model: nn.Module) -> list[nn.Module]:
    """Return the model and, where it is a wrapper, what it wraps."""
    return [
        module
        for name, module in model.named_modules()
        if not name or all(part in WRAPPERS for part in name.split("."))
    ]


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
