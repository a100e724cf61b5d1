"""FLOPs of a network and of what masks leave of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fisherprune.masks.compare import count, share
from fisherprune.parameters import plain_parameters
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.structure import tensors_in
from fisherprune.subnetwork.substitute import (
    checked_example,
    floating,
    masked_parameters,
    named_tensors_of,
    run_with,
    unwrapped,
)

FACTORIES = ("new_", "_like")
"""In names of ops whose output has the shape of their argument, and none of its values.
"""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass: a multiplication and an addition are two.

    Attributes:
        dense: of the whole network.
        masked: of the network without the products of weights that masks remove.
        by_parameter: both, of the products of each parameter, by its name.
        uncounted: masked parameters in no product that is counted, so that ``masked``
            holds nothing of them: those of BatchNorm or of an embedding, say, or of an
            operation of somebody's own.
    """

    dense: int
    masked: int
    by_parameter: Mapping[str, tuple[int, int]]
    uncounted: tuple[str, ...]

    @property
    def share(self) -> float:
        """The fraction ``masked / dense``; 1 where nothing is counted."""
        return share(self.masked, self.dense)


def flops(
    model: nn.Module, example: object, masks: Mapping[str, Tensor] | None = None
) -> Flops:
    """Count the FLOPs of a forward pass, with and without the weights that masks keep.

    Counted are convolutions and matrix products, as PyTorch's ``FlopCounterMode``
    counts them: ``2 * outputs * inputs * positions`` of a Linear module, for each
    sample of ``example``; attention as its two products, a causal one whole. Biases,
    normalizations, activations and poolings are not.

        masked = sum over products of FLOPs * density of each operand made of weights

    An operand that is a part, a view, a cast or another function of parameters alone,
    but no product that is counted, has the density of its own values; a layer that is
    called several times counts each time; products of activations count whole. The
    model runs once, in eval mode, and is left as found.

    Args:
        model: any module.
        example: what it is called with: a tensor, a tuple of arguments or a dictionary
            of keyword arguments.
        masks: bool by parameter name, True = kept; None: ``masked`` is ``dense``.

    Raises:
        FisherpruneError: where ``masks`` do not fit the model, ``example`` holds no
            tensor, or the model can't run on it.

    Example:
        >>> net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> found = flops(net, torch.ones(1, 6), {"0.weight": torch.eye(4, 6) > 0})
        >>> found.dense, found.masked, found.by_parameter
        (72, 32, {'0.weight': (48, 8), '2.weight': (24, 24)})
    """
    model, example = unwrapped(model), checked_example(example, "flops")
    masked = {} if masks is None else masked_parameters(masks, model, "flops")
    kept = {id(weight): mask for weight, mask in masked.values()}
    names = {id(p): name for name, p in plain_parameters(model).items()}
    with evaluating(model, ()):  # with gradients attention is not one fused layer
        tensors = {id(t): t for t in named_tensors_of(model).values() if floating(t)}
        values = {i: _values(t, kept.get(i)) for i, t in tensors.items()}
        products = _Products((t, names.get(i)) for i, t in values.items())
        with _unfused(), products:
            wanted = "flops: the model must run on the example"
            run_with(model, values, example, lambda t: t, wanted)
    dense, sparse = products.dense, products.masked
    return Flops(
        dense=products.total,
        masked=products.left,
        by_parameter={n: (dense[n], sparse[n]) for n in names.values() if n in dense},
        uncounted=tuple(n for n, (p, _) in masked.items() if names[id(p)] not in dense),
    )


def _values(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return a copy that is zero where the mask removes, and nowhere else."""
    values = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        values.masked_fill_(values == 0, 1)
    if mask is not None:
        values.masked_fill_(~mask, 0)
    return values.requires_grad_(tensor.requires_grad)


@contextmanager
def _unfused() -> Iterator[None]:
    """Run layers as the products that they are made of."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.mkldnn]  # of LSTM
    before = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


class _Products(TorchDispatchMode):
    """Finds the operands of products that are made of parameters alone.

    A tensor is known by its storage, which its views share. Those that are made of
    parameters and buffers alone are kept until the end, so no other gets their place.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[tuple[Tensor, str | None]]) -> None:
        super().__init__()
        self.total = self.left = 0
        self.dense: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()
        self._kept_alive: list[Tensor] = []
        self._names: dict[int, frozenset[str]] = {}
        for tensor, name in tensors:
            self._know(tensor, frozenset(() if name is None else (name,)))

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        out = func(*args, **named)
        name = getattr(func, "__name__", "").partition(".")[0]
        formula = flop_registry.get(getattr(func, "overloadpacket", func))
        if formula is not None:
            skipped = name in ("addmm", "baddbmm")  # the first is added, not multiplied
            found = formula(*args, **named, out_val=out)
            self._count(found, tensors_in([args[skipped:], named]))
        else:
            self._follow(name, tensors_in([args, named]), tensors_in(out))
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def _count(self, found: int, operands: list[Tensor]) -> None:
        left, names = found, frozenset[str]()
        for operand in operands:
            own = self._names.get(_place(operand))
            if own and operand.dim() > 1:
                left = left * count(operand) // operand.numel()
                names |= own
        self.total += found
        self.left += left
        for name in names:
            self.dense[name] += found
            self.masked[name] += left

    def _follow(self, op: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Note whether outputs are made of parameters alone, and of which."""
        known = [self._names.get(_place(t)) for t in inputs]
        constant = bool(inputs) and not any(part in op for part in FACTORIES)
        for out in outputs:
            if constant and None not in known:
                self._know(out, frozenset().union(*filter(None, known)))
            else:  # no more, if something else was written into it
                self._names.pop(_place(out), None)

    def _know(self, tensor: Tensor, names: frozenset[str]) -> None:
        place = _place(tensor)
        if place:
            self._names[place] = self._names.get(place, frozenset()) | names
            self._kept_alive.append(tensor)


def _place(tensor: Tensor) -> int:
    """Return the address of a tensor's values; 0 where it has none."""
    dense = tensor.layout == torch.strided and not tensor.is_meta
    return tensor.untyped_storage().data_ptr() if dense else 0
