"""Which weights lie on paths from the inputs of a network to its outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.masks.masks import Masks
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.structure import described, tensors_in
from fisherprune.streams import stream
from fisherprune.subnetwork.passing import Passing
from fisherprune.subnetwork.substitute import (
    Values,
    checked_example,
    floating,
    masked_parameters,
    named_tensors_of,
    run_with,
    unwrapped,
)


def effective_masks(
    model: nn.Module, example: object, masks: Mapping[str, Tensor]
) -> Masks:
    """Keep of masks the weights that lie on a path from an input to an output.

    A kept weight does nothing where all weights before it, or all after it, are
    removed: it is not *effective*. The sparsity of what is returned is the effective
    sparsity of the masks.

        effective = kept and x > 0 at some place where d(outputs) / d(w x) > 0

    in one forward and backward pass in float64, with positive random numbers in place
    of kept weights and inputs, so that nothing cancels, and 0 in place of biases, which
    begin no path: a unit that only its bias moves is as good as removed. A kept bias is
    effective where a path leads from its unit to an output. BatchNorm is its scale
    alone; rectifiers, bounds and max-pooling let pass whatever comes. So it is exact in
    networks of convolutions, Linear modules, these, sums, products and means, and in
    all others whose functions are smooth: LayerNorm and attention join what they
    normalize, and what does not depend on the input (positions, gates at rest) begins
    paths, too. Weights that a pass with ``example`` does not use have no path: taps
    of a convolution that see padding alone, for which a small image is enough, too.

    Args:
        model: any module; it is left as found.
        example: what it is called with: a tensor, a tuple of arguments or a dictionary
            of keyword arguments. Of floating-point tensors only the shape counts.
        masks: bool by parameter name, True = kept.

    Returns:
        The masks without the weights that are on no path.

    Raises:
        FisherpruneError: where ``masks`` do not fit the model, ``example`` holds no
            tensor, the model can't run in float64, it has no floating-point output, or
            a path can't be followed, through the choices of ``topk`` or ``sort``, say.

    References:
        Vysogorets and Kempe, "Connectivity Matters: Neural Network Pruning Through the
        Lens of Effective Sparsity", JMLR 24, 2023, arXiv 2107.02306.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> first = torch.tensor([[True, True], [False, False]])
        >>> masks = {"0.weight": first, "2.weight": torch.tensor([[False, True]])}
        >>> effective_masks(net, torch.ones(1, 2), masks)
        Masks(2 parameters, 0 of 6 weights kept)
    """
    model, example = unwrapped(model), checked_example(example, "effective_masks")
    pairs = masked_parameters(masks, model, "effective_masks")
    kept = {id(weight): mask for weight, mask in pairs.values()}
    draw = _Draw()
    with evaluating(model, ()):
        values = _values(named_tensors_of(model), kept, draw)
        weights = {name: values[id(weight)] for name, (weight, _) in pairs.items()}
        gradients = torch.autograd.grad(
            _total(model, example, values, draw),
            list(weights.values()),
            materialize_grads=True,
        )
    found = dict(zip(weights, gradients, strict=True))
    for name, gradient in found.items():
        if not gradient.isfinite().all():
            raise FisherpruneError(
                f"effective_masks: the paths through {name!r} can't be told: its "
                "gradient is NaN or infinite"
            )
    return Masks({n: m & (found[n] != 0).to(m.device) for n, m in masks.items()})


class _Draw:
    """Draws positive random numbers, the same in each process and on each device."""

    def __init__(self) -> None:
        self._stream = stream(0, "paths")

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return numbers in [0.5, 1.5) in the shape of a tensor, on its device."""
        values = torch.rand(tensor.shape, generator=self._stream, dtype=torch.float64)
        return values.add_(0.5).to(tensor.device)

    def weights(self, parameter: Tensor, mask: Tensor | None) -> Tensor:
        """Return numbers where the mask keeps, of about 1 in sum for an output."""
        values = self(parameter)
        if mask is not None:
            values *= mask
        outputs = parameter.shape[0] if parameter.dim() else 1
        return values * (outputs / values.sum().clamp_min(0.5))

    def input(self, tensor: Tensor) -> Tensor:
        """Return numbers in place of floating-point ones, else what came."""
        return self(tensor) if floating(tensor) else tensor


def _values(
    named: Mapping[str, Tensor], kept: Mapping[int, Tensor], draw: _Draw
) -> Values:
    """Return numbers in float64 for each parameter and buffer.

    Positive ones for weights, zero where they are removed, zeros for biases; running
    statistics that leave BatchNorm its scale alone.
    """
    values: dict[int, Tensor] = {}
    for path, tensor in named.items():
        if not floating(tensor) or id(tensor) in values:
            continue
        name = path.rpartition(".")[2]
        if "bias" in name or name == "running_mean":
            value = torch.zeros_like(tensor, dtype=torch.float64)
        elif name == "running_var":
            value = torch.ones_like(tensor, dtype=torch.float64)
        elif isinstance(tensor, nn.Parameter):
            value = draw.weights(tensor, kept.get(id(tensor)))
        else:
            value = tensor.detach().double()
        values[id(tensor)] = value.detach().requires_grad_(id(tensor) in kept)
    return values


def _total(model: nn.Module, example: object, values: Values, draw: _Draw) -> Tensor:
    """Return a sum of all outputs, each with a factor of its own."""
    wanted = "effective_masks: the model must run on the example in float64"
    with Passing():
        outputs = run_with(model, values, example, draw.input, wanted)
    found = [t for t in tensors_in(outputs) if floating(t)]
    if not found:
        raise FisherpruneError(
            "effective_masks: the model must return floating-point tensors, alone or "
            f"in tuples, lists or dictionaries, got {described(outputs)}"
        )
    weights = [value for value in values.values() if value.requires_grad]
    parts = [(t * draw(t)).sum().cpu() for t in found]
    return torch.stack([*parts, *(0 * w.sum().cpu() for w in weights)]).sum()
