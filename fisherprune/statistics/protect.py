"""What every statistics pass checks and protects."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fisherprune.errors import FisherpruneError
from fisherprune.layers import checked_model, prunable_parameters

Batches = Iterable[tuple[Tensor, Tensor]]
Parameters = dict[str, nn.Parameter]


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode with gradients on; what the model's forward may change is put back.

    That is modes, buffers, embeddings that it renormalizes and the global random state.
    Modes are set without ``eval()`` and ``train()``, in which some modules change
    weights. Inference mode is left, and compiled parts run as they are written:
    compiled code can't be tapped.
    """
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


def eager(model: nn.Module) -> nn.Module:
    """Return the module below ``torch.compile``: compiled code can't be tapped."""
    return getattr(model, "_orig_mod", model)


def device_of(parameters: Parameters) -> torch.device:
    """Return the device of the first parameter."""
    return next(iter(parameters.values())).device


def checked_batches(batches: Batches, device: torch.device) -> Iterator:
    """Yield the batches on ``device``, each checked to be a labelled batch."""
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise FisherpruneError(
            "batches must be an iterable of (inputs, labels) tensors, got "
            f"{type(batches).__name__}"
        )
    for i, batch in enumerate(batches):
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair or not all(isinstance(t, Tensor) and t.dim() for t in batch):
            raise FisherpruneError(
                "batches must yield (inputs, labels) tensors, samples first; batch "
                f"{i} is {_described(batch)}"
            )
        inputs, labels = batch
        if len(inputs) != len(labels) or len(inputs) == 0:
            raise FisherpruneError(
                f"batch {i} must have at least one sample and one label for each, got "
                f"{len(inputs)} inputs and {len(labels)} labels"
            )
        yield _own(inputs, device), _usable(labels, device)


def _described(value: object) -> str:
    """Say what came: ``tuple of (Tensor [8, 3], int)``."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} {list(value.shape)}"
    if not isinstance(value, (tuple, list)):
        return kind
    items = [_described(item) for item in value[:4]] + ["..."] * (len(value) > 4)
    return f"{kind} of ({', '.join(items)})"


def _own(inputs: Tensor, device: torch.device) -> Tensor:
    """Return the inputs on ``device``, a copy: the model may change them in place."""
    moved = _usable(inputs, device)
    return moved.clone() if moved is inputs else moved


def _usable(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on ``device``, as one that autograd may save."""
    tensor = tensor.to(device, non_blocking=True)
    return tensor.clone() if tensor.is_inference() else tensor


def checked_parameters(model: nn.Module, parameters: Parameters | None) -> Parameters:
    """Return ``parameters``, or the prunable ones, checked to be usable.

    Raises:
        FisherpruneError: where the model is no module or has lazy layers that never
            ran, or ``parameters`` is no dict of parameters of the model, each of them
            once, float32 and not frozen.
    """
    _check_shapes_known(checked_model(model))
    if parameters is None:
        parameters = prunable_parameters(model)
    if not isinstance(parameters, Mapping):
        raise FisherpruneError(
            "parameters must be a dict of the model's parameters by name, as "
            f"prunable_parameters returns, got {type(parameters).__name__}"
        )
    if not parameters:
        raise FisherpruneError("parameters must name at least one parameter")
    own, names = {id(p) for p in model.parameters()}, {}
    for name, p in parameters.items():
        if id(p) not in own:
            raise FisherpruneError(f"parameters: {name!r} is no parameter of the model")
        first = names.setdefault(id(p), name)
        if first != name:
            raise FisherpruneError(
                f"parameters: {first!r} and {name!r} are one parameter: leave one out"
            )
        _check_usable(name, p)
    return dict(parameters)


def _check_shapes_known(model: nn.Module) -> None:
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            if is_lazy(tensor):
                raise FisherpruneError(
                    f"model must have run once, so that its lazy layers have shapes: "
                    f"{name!r} has none yet"
                )


def _check_usable(name: str, parameter: nn.Parameter) -> None:
    if not parameter.requires_grad:
        raise FisherpruneError(
            f"parameters: {name!r} is frozen (requires_grad=False): unfreeze it or "
            "leave it out"
        )
    if parameter.dtype != torch.float32:
        raise FisherpruneError(
            f"parameters: {name!r} must be float32, got {parameter.dtype}"
        )


def check_unhooked(parameters: Parameters) -> None:
    """Raise where a hook would change a parameter's gradient, naming the parameter.

    Hooks that run after the gradient was accumulated, such as those of ``Masks.hold``,
    change the parameter's ``.grad``, which no pass reads: they are no reason.
    """
    for name, parameter in parameters.items():
        if parameter._backward_hooks:
            raise FisherpruneError(
                f"parameters: {name!r} must have no gradient hook (register_hook), "
                "whose changes the gradients of single samples would not show: remove "
                "it for scoring or leave the parameter out"
            )


def check_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Raise where an entry is NaN or infinite, naming the parameter.

    One read of each, and one wait for the device: a sum is finite unless an entry is
    not, or entries are so large that they overflow together, which only a closer look
    tells.
    """
    sums = [t.sum() for t in tensors.values()]
    sums = torch.stack([s.to(sums[0].device) for s in sums])
    for name, ok in zip(tensors, sums.isfinite().tolist(), strict=True):
        if not ok and not tensors[name].isfinite().all():
            raise FisherpruneError(f"{what} of {name!r} is NaN or infinite")
