"""Smaller dense models instead of masks that prune whole channels."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fisherprune.errors import FieldError, FisherpruneError, FisherpruneWarning
from fisherprune.masks.apply import pruned_weights
from fisherprune.masks.checks import checked_masks
from fisherprune.masks.hold import Hold
from fisherprune.modules import copied
from fisherprune.parameters import (
    check_shapes_known,
    checked_model,
    eager,
    fitted_names,
    plain_parameters,
)
from fisherprune.shards import any_shard
from fisherprune.sparse.absorb import absorb
from fisherprune.sparse.channels import CONVOLUTIONS, NORMALIZATIONS, pruned_channels
from fisherprune.sparse.graph import Graph
from fisherprune.sparse.probing import Probe
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.structure import described, tensors_in

SHOWN = 8


def shrink(
    model: nn.Module, masks: Mapping[str, Tensor], example_inputs: object
) -> nn.Module:
    r"""Return a smaller dense model without the channels that masks prune as a whole.

    Of a layer whose mask keeps no weight of output channel i, that channel is a
    constant c, its bias. So is what comes of it in evaluation mode, after BatchNorm,
    activations and pooling. Torch-Pruning's dependency graph says what depends on the
    channel: it goes with its bias, BatchNorm entries and the inputs of the next layers,
    whose biases take up what they have read of it:

    .. math:: b'_o = b_o + \sum_{i\,\text{gone}} c_i \sum_k w_{oik}

    Beside zeros of a padding c is no bias; there one channel, the carrier 0, stays a
    constant for all of them:

    .. math:: w'_{o0k} = w_{o0k} + \sum_{i\,\text{gone}} w_{oik}\, c_i / c_0

    The outputs in evaluation mode are those of the masked model up to rounding. That is
    tried, in float64, before anything is returned. Channels that no kept weight reads
    go, too, and a channel of a depthwise convolution takes along the one it reads.

    A channel stays where its removal would change outputs, with all that goes with it:

    - where it is a sum, of a residual connection say, and one of the summands is kept;
    - outputs of the model; one channel of each layer, and carriers;
    - where GroupNorm, LayerNorm, attention, a recurrent layer, or a parameter that
      belongs to no layer depends on it, or a weight is shared or computed;
    - in a convolution with groups, what is not pruned in all of its groups alike, and
      constants other than 0 that it pads with zeros;
    - where Torch-Pruning can't follow it, as through the shortcuts of ``resnet20``.

    A ``FisherpruneWarning`` says which pruned channels stay, and why. The weights that
    masks prune among those that stay are zero and held (``Masks.hold``).

    The model given is left as it is. In training mode the two models are equal as long
    as all constants are 0; others depend on statistics of the batch after BatchNorm,
    and what is trained of them in the masked model is part of biases in the smaller.

    Args:
        model: any module; in ``torch.compile`` or wrappers, what is inside of them is
            shrunk.
        masks: bool tensors by parameter name, True = kept, such as ``Masks`` of
            ``structure="channels"``.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or
            a dictionary of keyword arguments, of two samples or more at best. A
            constant may depend on numbers and integers in it, which count as fixed.

    Returns:
        A new model of the same classes, dtypes and modes.

    Raises:
        FisherpruneError: where Torch-Pruning is not installed or can't trace the model;
            the masks do not fit; the model is in shards or lazy; ``example_inputs``
            hold no tensor; the model or the smaller one can't run on them in float64,
            or their outputs differ.

    References:
        Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv
        2301.12900.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
        >>> kept = torch.tensor([True, False, True, False])
        >>> from fisherprune import Masks
        >>> masks = Masks({"0.weight": kept[:, None].expand(4, 6)})
        >>> x = torch.randn(5, 6)
        >>> small = shrink(model, masks, x)
        >>> small[0].out_features, small[2].in_features
        (2, 2)
        >>> masks.apply_(model)
        >>> torch.allclose(small(x), model(x), atol=1e-6)
        True
    """
    model = _checked(model)
    masks = checked_masks(masks, "shrink")
    pruned_weights(masks, model)
    if not tensors_in(example_inputs):
        wanted = "a tensor, or a tuple or dictionary that holds one"
        raise FieldError("shrink: example_inputs", wanted, described(example_inputs))
    small = copied("shrink", model)
    before = _Traits(small)
    small.double()
    _mask(small, masks)
    probe = Probe(small, example_inputs)
    pruned = _pruned(small)
    with evaluating(small, [p for p in small.parameters() if p.is_floating_point()]):
        expected = probe.outputs()
        graph = Graph(probe, probe.reads(pruned), _masks_of(small))
    absorb(graph)
    graph.prune()
    with evaluating(small, ()):
        _check_same(expected, probe.outputs(small))
    _warn_of_those_that_stay(graph, pruned)
    rest = _masks_left(small, masks)
    before.restore(small)
    if any(not mask.all() for mask in rest.values()):
        Hold(small, pruned_weights(rest, small))
    return small


def _checked(model: nn.Module) -> nn.Module:
    """Return the module inside of wrappers, if it can be shrunk."""
    model = eager(checked_model(model))
    while isinstance(model, DataParallel | DistributedDataParallel):
        model = eager(model.module)
    check_shapes_known(model)
    if any_shard(model.parameters()):
        raise FieldError("shrink: parameters", "whole", "some in shards")
    return model


class _Traits:
    """Dtypes and modes of a model, by names, which remain."""

    def __init__(self, model: nn.Module) -> None:
        named = [*model.named_parameters(), *model.named_buffers()]
        self._tensors = {name: (t.dtype, t.requires_grad) for name, t in named}
        self._modes = {name: m.training for name, m in model.named_modules()}

    def restore(self, model: nn.Module) -> None:
        """Give a model the same; a new bias gets those of its layer's weight."""
        for name, module in model.named_modules():
            module.training = self._modes[name]
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            known = name if name in self._tensors else f"{name[: -len('bias')]}weight"
            dtype, trained = self._tensors[known]
            tensor.data = tensor.data.to(dtype)
            tensor.grad = None
            tensor.requires_grad_(trained)


def _mask(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the zeros; the mask of a parameter goes along as its gradient."""
    for parameter, pruned in pruned_weights(masks, model).values():
        parameter.data.masked_fill_(pruned, 0.0)
        parameter.grad = (~pruned).to(parameter.dtype)


def _masks_of(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Return the masks of weights, by their modules."""
    weights = [(m, m._parameters.get("weight")) for m in model.modules()]
    return {m: w.grad != 0 for m, w in weights if w is not None and w.grad is not None}


def _masks_left(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of what is left."""
    named = plain_parameters(model)
    own = fitted_names(masks, named) or {}
    found = {name: named[own.get(name, name)].grad for name in masks}
    return {name: grad != 0 for name, grad in found.items() if grad is not None}


def _pruned(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Return which output channels of layers are pruned as a whole."""
    kinds = CONVOLUTIONS | nn.Linear | NORMALIZATIONS
    masks = {m: mask for m, mask in _masks_of(model).items() if isinstance(m, kinds)}
    return {module: pruned_channels(module, mask) for module, mask in masks.items()}


def _check_same(expected: list[Tensor], found: list[Tensor]) -> None:
    """Compare the outputs of the masked model with those of the smaller one."""
    for mine, theirs in zip(found, expected, strict=True):
        if not _are_close(mine, theirs):
            raise FisherpruneError(
                "shrink: the smaller model must have the masked model's outputs, but "
                "they differ, as where a model computes with its number of channels: "
                "leave out the masks of the layers before"
            )


def _are_close(mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape != theirs.shape or not theirs.is_floating_point():
        return torch.equal(mine, theirs)
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    bound = 1e-9 * largest if math.isfinite(largest) else 0.0
    return torch.allclose(mine, theirs, rtol=1e-6, atol=bound, equal_nan=True)


def _warn_of_those_that_stay(graph: Graph, pruned: Mapping[nn.Module, Tensor]) -> None:
    """Say which channels stay, and why."""
    why = dict[tuple[nn.Module, int], str]()
    gone = set[tuple[nn.Module, int]]()
    for coupled in graph.coupled:
        for module, channels in coupled.channels(coupled.outputs).items():
            gone |= {(module, i) for i in channels}
        for module, claims in coupled.outputs.items():
            for channel, roots in claims.items():
                for root in roots & coupled.stay.keys():
                    why[module, channel] = coupled.stay[root]
    lines = []
    for module, those in pruned.items():
        places = {(module, i) for i in those.nonzero().flatten().tolist()}
        left = [why.get(place, "no layer reads them") for place in places - gone]
        name = graph.names[module]
        lines += [
            f"{n} of {len(places)} of {name!r} ({reason})"
            for reason, n in sorted(Counter(left).items())
        ]
    if lines:
        some = "; ".join(lines[:SHOWN]) + ("; ..." if len(lines) > SHOWN else "")
        warnings.warn(
            f"shrink: pruned channels stay: {some}", FisherpruneWarning, stacklevel=3
        )
