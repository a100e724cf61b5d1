"""The check that samples of a batch don't mix: the last one is run alone, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.persample.tap import LayerTap
from fisherprune.statistics.passes import Task


@dataclass(frozen=True)
class Seen:
    """Results of a forward pass: outputs, the head's, and the calls' last inputs."""

    outputs: Tensor
    result: Tensor
    last_inputs: list[Tensor]
    refused: dict[str, str]
    """Why, by parameter: calls of these are not among those of ``last_inputs``."""


def run_last(
    op: str,
    task: Task,
    inputs: Tensor,
    labels: Tensor,
    head: Callable[[Tensor, Tensor], Tensor],
) -> Seen | FisherpruneError:
    """Run the last sample alone; return why where that fails.

    The last one, because what a sequence, a queue or a limited capacity makes of a
    sample depends on the samples before it.
    """
    tap = LayerTap(task.model, task.parameters, 1, lambda *_: None, op, keep_last=True)
    try:
        with tap.forward():
            outputs = task.model(inputs[-1:].clone())
            result = head(outputs, labels[-1:])
    except Exception as error:
        reason = f"{error}".partition("\n")[0] or type(error).__name__
        failure = FisherpruneError(
            f"{op}: the model must run with one sample, by which is seen whether "
            f"samples mix; alone, the last of the first batch fails: {reason}"
        )
        failure.__cause__ = error
        return failure
    return Seen(outputs.detach(), result.detach(), tap.last_inputs, tap.refused)


def check_apart(op: str, alone: Seen, together: Seen) -> None:
    """Refuse where the last sample's results differ, alone and in its batch.

    A small loss, or a layer's input that is nearly zero, has the rounding errors of the
    larger numbers from which it was computed.
    """
    size = float(together.outputs[-1].detach().float().norm())
    inputs = max((float(x.float().norm()) for x in together.last_inputs), default=0.0)
    pairs = [
        ("the model's output for", 0.0, alone.outputs[-1], together.outputs[-1]),
        ("the loss of", size, alone.result[-1], together.result[-1]),
    ]
    if alone.refused == together.refused == {}:  # else these may be different calls
        for one, other in zip(alone.last_inputs, together.last_inputs, strict=False):
            pair = _padded(one, other.shape), other
            pairs.append(("what a layer reads of", 1e-3 * inputs, *pair))
    tolerance = _tolerance(together.outputs)
    for what, least, one, other in pairs:
        if not _is_same(one.detach().float(), other.detach().float(), tolerance, least):
            raise FisherpruneError(
                f"{op}: samples mix: {what} a sample alone is another than in a batch "
                "(or it is random in eval mode, or samples change places on the way)"
            )


def _padded(x: Tensor, shape: torch.Size) -> Tensor:
    """Add zeros at the end, as a batch pads the shorter ones of its sequences."""
    missing = [whole - own for own, whole in zip(x.shape, shape, strict=False)]
    if x.dim() != len(shape) or min(missing, default=0) < 0:
        return x
    return F.pad(x, [side for size in reversed(missing) for side in (0, size)])


def _is_same(one: Tensor, other: Tensor, tolerance: float, least: float) -> bool:
    same = one.shape == other.shape
    return same and not (one - other).norm() > tolerance * (other.norm() + least)


def _tolerance(outputs: Tensor) -> float:
    """Return the relative error that other kernels for one sample may cause."""
    if outputs.dtype != torch.float32:
        return 5e-2
    cuda, cpu = ("cuda.matmul", "cudnn.conv"), ("mkldnn.matmul", "mkldnn.conv")
    reduced = {"tf32": 1e-2, "bf16": 5e-2}
    return max(
        reduced.get(attrgetter(f"{backend}.fp32_precision")(torch.backends), 1e-3)
        for backend in (cuda if outputs.is_cuda else cpu)
    )
