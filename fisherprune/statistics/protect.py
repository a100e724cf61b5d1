"""What a statistics pass protects: all that a forward pass may change."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fisherprune.statistics.interrupts import deferred_interrupts, deliver_interrupt

_PASSES = threading.RLock()
"""One for all models: they may share modules, and the random state is the process's."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients on; what the model's forward may change is put back.

    That is modes, buffers, embeddings that it scales and the global random state.
    Modes are set without ``eval()`` and ``train()``, in which some modules change
    weights. Inference mode is left, and compiled parts run as they are written:
    compiled code can't be tapped.

    Passes of several threads run one after the other; a pass within a pass of the same
    thread, of a loss function say, is let in. Ctrl-C takes effect at the next batch or
    the end of the pass, a second one at once.
    """
    with deferred_interrupts() as interrupts, _one_at_a_time(), _evaluating(model):
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with (
        torch.inference_mode(False),
        torch.random.fork_rng(sorted(devices)),
        torch.enable_grad(),
        _uncompiled(),
        _kept_buffers(model),
        _kept_embeddings(model),
    ):
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _uncompiled() -> AbstractContextManager:
    # Where nothing was compiled, importing the compiler would cost more than a pass.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put back the values of buffers, and which buffers there are."""
    kept = [(module._buffers, dict(module._buffers)) for module in model.modules()]
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
            if [*now] != [*before] or any(now[n] is not b for n, b in before.items()):
                now.clear()
                now.update(before)
        _put_back(values)


@torch.no_grad()
def _put_back(values: list[tuple[Tensor, int, Tensor]]) -> None:
    for tensor, version, before in values:
        if tensor.shape != before.shape:
            tensor.resize_(before.shape)
        # What changes ``tensor.data`` counts no version.
        if tensor._version != version or not torch.equal(tensor, before):
            tensor.copy_(before)


@contextmanager
def _kept_embeddings(model: nn.Module) -> Iterator[None]:
    """Put back the weights that a lookup with ``max_norm`` scales."""
    values = [
        (module.weight, module.weight._version, module.weight.detach().clone())
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.max_norm is not None
    ]
    try:
        yield
    finally:
        _put_back(values)
