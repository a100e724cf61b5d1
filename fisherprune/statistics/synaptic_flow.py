"""The synaptic flow of a network, and its derivatives: no data but a sample's shape."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisherprune.errors import FisherpruneError, FisherpruneWarning
from fisherprune.parameters import device_of
from fisherprune.statistics.batches import Batch, grads_of, running
from fisherprune.statistics.driver import batches_of
from fisherprune.statistics.passes import ModelStatistics, Task, register_pass
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.ranks import gathered, no_samples
from fisherprune.statistics.stand_ins import check_stand_ins

OP = "synaptic_flow"
TOP = 100
"""Exponent of the largest derivative of a float64 pass: it leaves room below."""
SAFE = 2.0**60
"""Flows up to it, and down to its inverse, are computed in float32."""


def _check_losses(task: Task) -> None:
    if task.losses is not None:
        raise FisherpruneError(
            f"{OP} (criterion synflow) runs the model on an input of ones: batches "
            "must be (inputs, labels), and losses left out"
        )


@register_pass("synaptic_flow", yields=("R",), check=_check_losses, over_ranks=True)
def synaptic_flow_pass(task: Task) -> ModelStatistics:
    r"""Yield the derivatives of the flow with respect to the absolute weights.

    The flow :math:`R = 1^\top f_{|\theta|}(1)` is the sum of the outputs of the network
    whose parameters and buffers (biases and BatchNorm's too) are replaced by their
    absolute values, in eval mode, for one input of ones. It costs a forward and a
    backward pass of one sample: in float32 where the flow is in its middle range,
    otherwise in float64. Loss, labels and pixels are not read.

    Reference:
        Tanaka et al., "Pruning neural networks without any data by iteratively
        conserving synaptic flow", 2020, arXiv 2006.05467.
    """
    with evaluating(task.model, task.parameters.values()):
        ones = _ones(task)
    ones = _of_first_rank(task, ones)
    with evaluating(task.model, task.parameters.values()):
        flow, slopes = _derivatives(task, ones, torch.float32)
        if not 1 / SAFE < flow < SAFE:
            flow, slopes = _derivatives(task, ones, torch.float64)
            if not 0 < flow < math.inf:
                raise FisherpruneError(
                    f"{OP}: the flow must be above 0 and finite, got {flow} in "
                    f"float64: {_reason(flow)}"
                )
    if task.masks is None:  # not in each round
        _warn_of_negative(slopes)
    return _in_float32(slopes)


def _reason(flow: float) -> str:
    if flow < 0:
        return (
            "the network makes negative values of positive ones, as LayerNorm and "
            "GroupNorm do: choose another criterion"
        )
    if flow == 0:
        return (
            "no path leads through the network (a layer may be all zeros: initialize "
            "it), or its weights are too small"
        )
    return "its weights are too large"


def _warn_of_negative(slopes: Mapping[str, Tensor]) -> None:
    if torch.stack([(s < 0).any() for s in slopes.values()]).any():
        warnings.warn(
            f"{OP}: the flow falls where some weights grow, as with LayerNorm, "
            "GroupNorm and softmax, so criterion synflow prunes these weights first, "
            "and may collapse a layer: another criterion suits such a network",
            FisherpruneWarning,
            stacklevel=2,
        )


def _ones(task: Task) -> Batch | None:
    """Return a batch of one sample of ones, of the shape of the data's."""
    batch = next(batches_of(OP, replace(task, progress=False)), None)
    if batch is None:  # of this rank
        return None
    inputs = batch.content[0]
    if not inputs.is_floating_point():
        raise FisherpruneError(
            f"{OP} (criterion synflow) takes an input of ones: inputs must be "
            f"floating-point numbers, got {str(inputs.dtype).removeprefix('torch.')}"
        )
    return replace(batch, content=torch.ones_like(inputs[:1]), size=1)


def _of_first_rank(task: Task, ones: Batch | None) -> Batch:
    """Return the ones of the first rank that has a batch."""
    if task.process_group is None and ones is not None:
        return ones
    sent = None if ones is None else replace(ones, content=ones.content.cpu())
    found = [each for each in gathered(task, OP, sent) if each is not None]
    if not found:
        raise no_samples(OP)
    content = found[0].content.to(device_of(task.parameters))
    return replace(found[0], content=content)


def _derivatives(
    task: Task, ones: Batch, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    """Return the flow, and its derivatives by parameter name."""

    def absolute(tensor: Tensor) -> Tensor:
        found = tensor.detach().abs()
        return found.to(dtype) if found.is_floating_point() else found

    model = task.model
    names = {id(p): name for name, p in task.parameters.items()}
    state = {name: absolute(p) for name, p in model.named_parameters()}
    scored = {
        names[id(p)]: state[name].requires_grad_()
        for name, p in model.named_parameters()
        if id(p) in names
    }
    state |= {name: absolute(buffer) for name, buffer in model.named_buffers()}
    state = {f"model.{name}": tensor for name, tensor in state.items()}
    there = _There(model, [*scored.values()])
    with running(OP, ones):
        flow, slopes = functional_call(there, state, (ones.content.to(dtype),))
    check_stand_ins(OP, flow, model)
    return flow.item(), dict(zip(scored, slopes, strict=True))


class _There(nn.Module):
    """The flow and its derivatives for weights that a model has for one call.

    The backward pass belongs to the call: parts of the model may run in it again.
    """

    def __init__(self, model: nn.Module, weights: list[Tensor]) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, ones: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the model forward and backward."""
        flow = _sum(self.model(ones))
        return flow, grads_of(OP, flow, self.weights)


def _sum(outputs: object) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.requires_grad:
        raise FisherpruneError(
            f"{OP}: the model's output must be a tensor that depends on a parameter, "
            f"got {type(outputs).__name__}"
        )
    return outputs.sum()


def _in_float32(slopes: Mapping[str, Tensor]) -> ModelStatistics:
    """Return the derivatives, times a power of two where they leave float32's range."""
    if all(s.dtype == torch.float32 for s in slopes.values()):
        return ModelStatistics({"R": slopes})
    tops = torch.stack([s.max() for s in slopes.values() if s.numel()])
    exponent = TOP - math.frexp(float(tops.max()))[1]
    shifted = {
        n: torch.ldexp(s, torch.tensor(exponent)).float() for n, s in slopes.items()
    }
    return ModelStatistics({"R": shifted}).scaled(R=exponent)
