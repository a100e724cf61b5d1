"""``torch.einsum`` and ``torch.tensordot`` of two operands, one of them a weight.

Where the last axis of one meets a matrix, they are a linear layer. Of others, there is
a rule for the weight, and the gradient of the other operand is autograd's.

A letter of the weight that the output has is one of its outputs, one that the other
operand has is one of its inputs, and one that both have numbers blocks of it. Other
letters are positions, or summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from string import ascii_letters

import torch
from torch import Tensor

from fisherprune.persample.contributions import Contribution
from fisherprune.persample.factors import Blocks, Factors
from fisherprune.persample.layers.linear import _Linear
from fisherprune.persample.layers.product import _Product
from fisherprune.persample.meeting import Meeting, multiplied_out, register_rule
from fisherprune.persample.registry import LayerCall, register_layer


@register_layer(torch.einsum)
def einsum(equation: object, *operands: Tensor) -> LayerCall | None:
    """Sort the arguments of ``torch.einsum`` out, of ``"nti,io->nto"`` say."""
    found = _matrix_in(equation) if isinstance(equation, str) else None
    if found is None or len(operands) != 2:
        return None
    place, is_transposed, dims = found
    x, weight = operands[1 - place], operands[place]
    fits = x.dim() == dims if dims > 0 else x.dim() >= -dims
    return _linear_layer(x, weight, is_transposed) if fits else None


@register_layer(torch.tensordot)
def tensordot(
    a: Tensor, b: Tensor, dims: object = 2, out: Tensor | None = None
) -> LayerCall | None:
    """Sort the arguments of ``torch.tensordot`` out, of ``x, weight, 1`` say."""
    match dims:
        case int(1):
            return _linear_layer(a, b, False)
        case ((int(left),), (int(right),)) if left in (-1, a.dim() - 1):
            return _linear_layer(a, b, right in (-1, 1))
    return None


def _linear_layer(x: Tensor, weight: Tensor, is_transposed: bool) -> LayerCall | None:
    """Return the call of ``[*, in]`` with ``[in, out]``, or with ``[out, in]``.

    None where the axes that meet differ: one of 1 is broadcast.
    """
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[is_transposed]:
        return None
    layer = _Linear() if is_transposed else _Product()
    return LayerCall(layer, x, weight, None, weight_dims=2)


@cache
def _matrix_in(equation: str) -> tuple[int, bool, int] | None:
    """Return which operand of an equation is the matrix of a linear layer.

    And whether it is ``[out, in]``, and the dimensions of the other operand: where it
    has ``...``, minus those that it has at least.
    """
    sides, _, output = equation.replace(" ", "").partition("->")
    operands = sides.split(",")
    for place in (1, 0) if len(operands) == 2 else ():
        x, weight = operands[1 - place], operands[place]
        letters = x.replace("...", "")
        out = weight.replace(letters[-1:], "")
        if len(weight) != 2 or len(out) != 1 or not x.endswith(letters[-1:] or "."):
            continue
        is_unique = out.isalpha() and len({*letters, out}) == len(letters) + 1
        if is_unique and output == x[:-1] + out:
            dims = len(letters) if letters == x else -len(letters)
            return place, weight[0] == out, dims
    return None


@register_rule(torch.einsum)
def contractions(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """Return those of what an equation as ``"nti,io->nto"`` sums."""
    equation = meeting.arguments[0][0]
    if len(tensors) == 2 and len(meeting.shared) == 1 and _has_output(equation):
        (own,) = meeting.shared
        operands, output = equation.replace(" ", "").split("->")
        letters = operands.split(",")
        if "." not in letters[own]:
            unnamed = [a for a in ascii_letters if a not in equation]
            dots = "".join(
                unnamed[: tensors[1 - own].dim() + 3 - len(letters[1 - own])]
            )
            letters = [letters[1 - own], letters[own], output]
            letters = [each.replace("...", dots) for each in letters]
            return _contraction(meeting, grad, tensors, letters)
    return multiplied_out(meeting, grad, tensors)


@register_rule(torch.tensordot)
def dot_products(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """Return those of what ``torch.tensordot`` sums over axes of both operands."""
    args, kwargs = meeting.arguments
    dims = args[2] if len(args) > 2 else kwargs.get("dims", 2)
    if len(tensors) != 2 or len(meeting.shared) != 1 or isinstance(dims, Tensor):
        return multiplied_out(meeting, grad, tensors)
    left, right = (t.dim() for t in tensors)
    pairs = dims if isinstance(dims, (tuple, list)) else (range(-dims, 0), range(dims))
    first, second = list(ascii_letters[:left]), list(ascii_letters[left:][:right])
    for a, b in zip(*pairs, strict=True):
        second[b] = first[a]
    output = [a for a in first + second if (a in first) != (a in second)]
    (own,) = meeting.shared
    operands = ["".join(each) for each in (first, second)]
    letters = operands[1 - own], operands[own], "".join(output)
    return _contraction(meeting, grad, tensors, letters)


def _contraction(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor], letters: Sequence[str]
) -> dict[int, Contribution]:
    """Return the gradients of the one operand that is shared.

    Args:
        meeting: of two operands.
        grad: of the output.
        tensors: the operands.
        letters: of the axes of the operand of samples, of the shared one and of the
            output.
    """
    (own,) = meeting.shared
    if layout := meeting.layouts[1 - own]:
        x = layout.apart(tensors[1 - own]).to(grad.dtype)
        shape = tuple(tensors[own].shape)
        found = _gradients(x, meeting.output.apart(grad), letters, shape)
        if found is not None:
            return {own: found}
    return multiplied_out(meeting, grad, tensors)


def _has_output(equation: object) -> bool:
    """Return whether an equation is one, and says what its output is."""
    return isinstance(equation, str) and "->" in equation


def _gradients(
    x: Tensor, grad: Tensor, letters: Sequence[str], shape: tuple[int, ...]
) -> Contribution | None:
    """Return the gradients of a weight; None where its axes are in no such order.

    Args:
        x: ``[N, *]``, the operand that is of samples.
        grad: ``[N, *]``, of the output.
        letters: those of x, of the weight and of the output.
        shape: the weight's.
    """
    other, weight, output = letters
    blocks = "".join(a for a in weight if a in other and a in output)
    inputs = "".join(a for a in weight if a in other and a not in output)
    outputs = "".join(a for a in weight if a not in other and a in output)
    rows = "".join(a for a in output if a in other and a not in weight)
    orders = {blocks + inputs + outputs: True, blocks + outputs + inputs: False}
    is_unique = len(set(weight)) == len(weight)
    if weight not in orders or not is_unique or grad.is_complex():
        return None
    x = _in_order(x, other, blocks + rows + inputs)
    grad = _in_order(grad, output, blocks + rows + outputs)
    sizes = dict(zip(weight, shape, strict=True))
    ends = 1 + len(blocks), 1 + len(blocks) + len(rows)
    if any(
        [sizes[a] for a in blocks + own] != [*t.shape[1 : ends[0]], *t.shape[ends[1] :]]
        for t, own in ((x, inputs), (grad, outputs))
    ):
        return None  # an axis of 1 is broadcast
    left, right = (_grouped(t, *ends) for t in (x, grad))
    if not orders[weight]:
        left, right = right, left
    if len(shape) == 2 and not blocks:
        return Factors(right[:, 0], left[:, 0], shape)
    matrices = left.shape[1], left.shape[-1], right.shape[-1]
    return replace(Blocks.of(left, right, matrices), shape=shape)


def _in_order(x: Tensor, letters: str, order: str) -> Tensor:
    """Return ``[N, *]`` with its axes in an order, the sum over those it has not."""
    if sorted(letters) == sorted(order):
        return x.permute(0, *(1 + letters.index(a) for a in order))
    n = next(a for a in ascii_letters if a not in letters)
    return torch.einsum(f"{n}{letters}->{n}{order}", x)


def _grouped(x: Tensor, first: int, last: int) -> Tensor:
    """``[N, *blocks, *rows, *features] -> [N, B, T, F]``."""
    sizes = x.shape[1:first], x.shape[first:last], x.shape[last:]
    return x.reshape(len(x), *(each.numel() for each in sizes))
