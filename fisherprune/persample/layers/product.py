"""Products with a weight: Hugging Face's ``Conv1D``, ``x @ weight``, experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherprune import ops
from fisherprune.persample.contributions import Contribution, Rows, summed_positions
from fisherprune.persample.factors import Blocks, Factors
from fisherprune.persample.meeting import Meeting, multiplied_out, register_rule
from fisherprune.persample.ragged import Experts, RaggedFactors
from fisherprune.persample.registry import LayerCall, register_layer


@dataclass(frozen=True)
class _Product:
    """A linear layer whose weight is stored transposed."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[N, *, in] -> [N, *, out]``."""
        return ops.linear(input, weight.mT, bias)

    def input_grad(self, grad: Tensor, input: Tensor | None, weight: Tensor) -> Tensor:
        flat = grad.flatten(0, -2)  # else some strides mean slow products
        return ops.linear(flat, weight).view(*grad.shape[:-1], weight.shape[0])

    def weight_grads(
        self, grad: Tensor, input: Tensor, shape: tuple[int, ...]
    ) -> Factors:
        return Factors(grad, input, shape)

    def bias_grads(self, grad: Tensor) -> Rows:
        return summed_positions(grad.movedim(-1, 1))


@register_layer(torch.addmm)
def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> LayerCall | None:
    """Sort the arguments of ``torch.addmm`` out: the bias comes first."""
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return None
    return LayerCall(_Product(), mat1, mat2, input, dims=None, weight_dims=2)


@register_layer(torch.matmul)
def matmul(input: Tensor, other: Tensor) -> LayerCall | None:
    """Sort the arguments of ``torch.matmul`` out."""
    if other.dim() != 2 or input.dim() < 2:
        return None
    return LayerCall(_Product(), input, other, None, weight_dims=2)


register_layer(torch.mm)(matmul)
register_layer(Tensor.matmul)(matmul)
register_layer(Tensor.mm)(matmul)


@register_rule(torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm)
def products(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """``[N, *, B, T, in] @ [B, in, out]``, or ``[out, in] @ [N, *, in, T]``."""
    grads = meeting.output.apart(grad)
    match meeting.layouts, meeting.shared:
        case (layout, None), (1,) if layout and tensors[1].dim() == 3:
            shape = tuple(tensors[1].shape)
            input = layout.apart(tensors[0])
            input = input.expand(*grads.shape[:-1], input.shape[-1])
            input, grads = (_by_block(each, shape[0]) for each in (input, grads))
            return {1: Blocks.of(input, grads, shape)}
        case (None, layout), (0,) if layout and tensors[0].dim() == 2:
            input = layout.apart(tensors[1])
            if input.dim() > 2:
                shape = tuple(tensors[0].shape)
                return {0: Factors(input.mT, grads.mT, shape)}
    return multiplied_out(meeting, grad, tensors)


def _by_block(rows: Tensor, count: int) -> Tensor:
    """``[N, *, B, T, features] -> [N, B, *, features]``."""
    if count == 1:
        return rows.flatten(1, -2).unsqueeze(1)
    return rows.movedim(-3, 1).flatten(2, -2)


def is_grouped(tensors: Sequence[Tensor], shared: Collection[int]) -> bool:
    """Return whether a grouped product is one of rows with a matrix for each expert."""
    return [t.dim() for t in tensors] == [2, 3, 1] and set(shared) == {1}


@register_rule(torch._grouped_mm)
def grouped_products(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """``[R, in]`` rows, those of each expert together, ``@ [E, in, out]``."""
    if not is_grouped(tensors, meeting.shared):
        return multiplied_out(meeting, grad, tensors)
    input, weight, ends = tensors
    samples, shape = meeting.sample_of_rows(grad[:, 0]), tuple(weight.shape[1:])
    parts, start = [], 0
    for end in ends.tolist():
        rows = slice(start, end)
        own = Factors(grad[rows], input[rows], shape)
        parts.append(RaggedFactors.of(own, samples[rows], meeting.samples))
        start = end
    return {1: Experts(tuple(parts))}
