"""What a statistics pass protects: all that a forward pass may change."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import repeat
from operator import is_
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from fisherprune.persample.calls import unmark
from fisherprune.statistics.interrupts import deferred_interrupts, deliver_interrupt

P = ParamSpec("P")
R = TypeVar("R")
_PASSES = threading.RLock()
"""One for all models: they may share modules, and the random state is the process's."""


@contextmanager
def evaluating(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Eval mode with gradients on; what the model's forward may change is put back.

    Frozen ones of the parameters have gradients in the meantime.

    That is modes, buffers, embeddings that it scales, attributes in which it leaves
    tensors of the pass's graph, and the global random state.
    Modes are set without ``eval()`` and ``train()``, in which some modules change
    weights. Inference mode is left, and compiled parts run as they are written:
    compiled code can't be tapped.

    Passes of several threads run one after the other; a pass within a pass of the same
    thread, of a loss function say, is let in. Ctrl-C takes effect at the next batch or
    the end of the pass, a second one at once.
    """
    with (
        deferred_interrupts() as interrupts,
        _one_at_a_time(),
        _evaluating(model),
        _thawed(parameters),
    ):
        if interrupts:
            interrupts.inside = True
        try:
            yield
        finally:
            if interrupts:
                interrupts.inside = False


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    while not _PASSES.acquire(timeout=0.1):
        deliver_interrupt()
    try:
        yield
    finally:
        _PASSES.release()


@contextmanager
def _thawed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modules = [*model.modules()]
    modes = [module.training for module in modules]
    parameters = (p for module in modules for p in module._parameters.values())
    devices = {p.device.index for p in parameters if p is not None and p.is_cuda}
    with (
        torch.inference_mode(False),
        torch.random.fork_rng(sorted(devices)),
        torch.enable_grad(),
        _uncompiled(),
        _quiet_vmap(),
        _kept_attributes(model, modules),
        _kept_buffers(modules),
        _kept_embeddings(modules),
    ):
        _set_modes(modules, repeat(False))
        try:
            with _differentiable_recurrent(modules):
                yield
        finally:
            _set_modes(modules, modes)


def _set_modes(modules: list[nn.Module], modes: Iterable[bool]) -> None:
    for module, training in zip(modules, modes, strict=False):
        if module.training != training:  # to set an attribute of a module takes long
            module.training = training


@contextmanager
def _differentiable_recurrent(modules: list[nn.Module]) -> Iterator[None]:
    """Run cuDNN's recurrent layers as in training: else they can't go backward.

    Without dropout, they compute the same.
    """
    layers = [m for m in modules if isinstance(m, (nn.LSTM, nn.GRU, nn.RNN))]
    chosen = [m for m in layers if any(p.is_cuda for p in m.parameters())]
    dropouts = [module.dropout for module in chosen]
    for module in chosen:
        module.training, module.dropout = True, 0.0
    try:
        yield
    finally:
        for module, dropout in zip(chosen, dropouts, strict=True):
            module.dropout = dropout


def _uncompiled() -> AbstractContextManager:
    # Where nothing was compiled, importing the compiler would cost more than a pass.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _quiet_vmap() -> Iterator[None]:
    """Let vmap not warn of functions that it runs sample by sample: nobody chose it."""
    show = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    show(False)
    try:
        yield
    finally:
        show(True)


@contextmanager
def _kept_buffers(modules: list[nn.Module]) -> Iterator[None]:
    """Put back the values of buffers, and which buffers there are."""
    kept = [(module._buffers, dict(module._buffers)) for module in modules]
    values = [
        (buffer, buffer._version, buffer.detach().clone())
        for _, buffers in kept
        for buffer in buffers.values()
        if buffer is not None and not buffer.is_inference()  # those can't be changed
    ]
    try:
        yield
    finally:
        for now, before in kept:
            if not _are_same(now, before):
                now.clear()
                now.update(before)
        _put_back(values)


@contextmanager
def _kept_attributes(model: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """Put back attributes that hold a graph: it takes memory and can't be copied."""
    kept = Attributes(modules)
    try:
        yield
    finally:
        for module in model.modules():
            for name, value in module.__dict__.items():
                if name not in WITHOUT_TENSORS and type(value) not in PLAIN:
                    unmark(_content(value))
        kept.put_back()


PLAIN = frozenset({int, float, bool, str, type(None)})
"""Kinds of most attributes, which hold no tensor."""

OWN = frozenset(nn.Module().__dict__) - {"_buffers"}
"""Attributes of all modules, in which no forward pass leaves a graph."""
WITHOUT_TENSORS = OWN - {"_parameters"}
"""Those that hold modules, hooks or flags."""


class _Kept:
    """The attributes of one module, its ``__dict__``."""

    def __init__(self, now: dict[str, Any]) -> None:
        self.now, self.before = now, dict(now)
        self.holders: dict[str, object] = {}
        self.may_hold: list[str] = []
        for name, value in now.items():
            if type(value) in PLAIN or name in OWN or not _may_hold(value):
                continue
            self.holders[name] = _copied(value)
            self.may_hold.append(name)

    def put_back(self) -> None:
        """Put back those that hold a graph."""
        now = self.now
        same = _are_same(now, self.before)  # as those of most modules
        for name in self.may_hold if same else [*now.keys() - OWN]:
            if not _holds_graph(now[name]):
                continue
            if name in self.before:
                now[name] = self.before[name]
                _refill(now[name], self.holders.get(name))
            else:
                del now[name]


class Attributes:
    """The attributes of modules, as they are now.

    Args:
        modules: all that a model has.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [_Kept(module.__dict__) for module in modules]

    def put_back(self) -> None:
        """Put back those that hold a graph."""
        with torch._C.DisableTorchFunction():  # a tap would see who asks for graphs
            for each in self._kept:
                each.put_back()


def versions_of(model: nn.Module) -> list[int]:
    """Return how often parameters and buffers were changed in place."""
    every = (*model.parameters(), *model.buffers())
    return [0 if each.is_inference() else each._version for each in every]


def forgetting(model: nn.Module, forward: Callable[P, R]) -> Callable[P, R]:
    """Return a forward pass that leaves no graph in attributes of the model.

    Else what a model keeps of a parameter, a table of positions say, would come into
    the next pass from where nobody sees, with a graph that this one has freed.

    Args:
        model: that runs in it.
        forward: any function.
    """
    attributes = Attributes(model.modules())

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return forward(*args, **kwargs)
        finally:
            attributes.put_back()

    return run


HOLDERS = Tensor, list, tuple, dict
"""What holds tensors."""


def _are_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return whether two dictionaries have the same entries, in the same order."""
    return [*now.keys()] == [*before] and all(map(is_, now.values(), before.values()))


def _copied(value: object) -> object:
    """Return a copy of a list's or dictionary's content."""
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, list) else None


def _refill(value: object, content: object) -> None:
    if isinstance(value, list) and isinstance(content, list):
        value[:] = content
    elif isinstance(value, dict) and isinstance(content, dict):
        value.clear()
        value.update(content)


def _may_hold(value: object) -> bool:
    """Return whether a value that is not replaced may come to hold a graph."""
    if isinstance(value, tuple):
        return not PLAIN.issuperset(map(type, value)) and any(map(_may_hold, value))
    return isinstance(value, (Tensor, list, dict))


def _content(value: object) -> Iterable[object]:
    """Return what a list or dictionary holds; a value itself of another kind."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else (value,)


def _holds_graph(value: object) -> bool:
    if not isinstance(value, HOLDERS):
        return False
    if type(value) is dict and not value:  # a module's buffers, mostly
        return False
    todo, seen = [value], set()
    while todo:
        each = todo.pop()
        if isinstance(each, Tensor) and each.grad_fn is not None:
            return True
        if isinstance(each, (list, tuple, dict)) and id(each) not in seen:
            seen.add(id(each))
            todo += each.values() if isinstance(each, dict) else each
    return False


AT_ONCE = 1 << 20
"""Bytes of a tensor up to which it is compared together with others."""


@torch.no_grad()
def _put_back(values: list[tuple[Tensor, int, Tensor]]) -> None:
    for tensor, _, before in values:
        if tensor.shape != before.shape:
            tensor.resize_(before.shape)
    # What changes ``tensor.data`` counts no version.
    quiet = [each for each in values if each[0]._version == each[1]]
    small = [each for each in quiet if _is_small(each[0])]
    same = {id(t) for t, _, _ in small} if _are_equal(small) else set()
    for tensor, version, before in values:
        if id(tensor) in same:
            continue
        if tensor._version != version or not torch.equal(tensor, before):
            tensor.copy_(before)


def _is_small(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.nbytes <= AT_ONCE


def _are_equal(values: list[tuple[Tensor, int, Tensor]]) -> bool:
    """Return whether all tensors have the bytes they had, with a wait a device."""
    alike = defaultdict[object, dict[object, list[tuple[Tensor, Tensor]]]](dict)
    for tensor, _, before in values:
        alike[tensor.device].setdefault(tensor.dtype, []).append((tensor, before))
    for by_dtype in alike.values():
        pairs = (map(_bytes_of, zip(*some, strict=True)) for some in by_dtype.values())
        if not torch.equal(*map(torch.cat, zip(*pairs, strict=True))):
            return False
    return True


def _bytes_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the bytes of tensors of one dtype, one after the other."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).view(
        torch.uint8
    )


@contextmanager
def _kept_embeddings(modules: list[nn.Module]) -> Iterator[None]:
    """Put back the weights that a lookup with ``max_norm`` scales.

    Sparse gradients are dense ones in the meantime, which have a second derivative.
    """
    tables = [m for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    values = [
        (module.weight, module.weight._version, module.weight.detach().clone())
        for module in tables
        if module.max_norm is not None
    ]
    sparse = [module for module in tables if module.sparse]
    for module in sparse:
        module.sparse = False
    try:
        yield
    finally:
        for module in sparse:
            module.sparse = True
        _put_back(values)
