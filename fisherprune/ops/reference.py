"""Pure-PyTorch twins of the ops: the specification, for tests and benchmarks.

Each function has the signature of its namesake in ``wrappers.py`` and says in the
plainest PyTorch what it computes, with no regard for memory or time. All dtypes are
accepted and the arithmetic is done in the dtype of the accumulators, so float64 gives a
truth to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def grad_moments(
    input: Tensor,
    grad: Tensor,
    sum: Tensor,
    sum_sq: Tensor,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    group_size: int = 1,
) -> None:
    """Materialize the per-sample gradients, average by group, add, square and add."""
    if input.numel() == 0 or grad.numel() == 0:
        return  # no samples or only zero gradients: nothing to add
    input, grad = input.to(sum.dtype), grad.to(sum.dtype)
    if sum.dim() == 2:
        per_sample = torch.einsum(
            "nto,nti->noi", _flat_positions(grad), _flat_positions(input)
        )
    else:
        kernel = tuple(sum.shape[2:])
        patches = F.unfold(input, kernel, dilation, padding, stride)
        patches = patches.unflatten(1, (groups, -1))  # [N, groups, patch, T]
        grads = grad.flatten(2).unflatten(1, (groups, -1))  # [N, groups, O / groups, T]
        per_sample = torch.einsum("ngot,ngkt->ngok", grads, patches)
    for group in per_sample.split(group_size):
        mean = group.mean(0).view_as(sum)
        sum += mean
        sum_sq += mean * mean


def _flat_positions(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


def global_topk(
    scores: Sequence[Tensor],
    keep: Sequence[int],
    names: Sequence[str] | None = None,
    *,
    ranks: Sequence[int] = (),
) -> tuple[list[list[Tensor]], Tensor]:
    """Concatenate, sort stably from the largest down, keep the first k."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    order = torch.sort(flat, descending=True, stable=True).indices
    masks = []
    for k in keep:
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[order[:k]] = True
        parts = mask.split([s.numel() for s in scores])
        masks.append([m.view(s.shape) for m, s in zip(parts, scores, strict=True)])
    all_ranks = (*keep, *ranks)
    thresholds = [flat[order[k - 1]].item() if k else float("inf") for k in all_ranks]
    return masks, flat.new_tensor(thresholds)


def _keys(scores: Tensor) -> Tensor:
    """Return the order-preserving unsigned 32-bit image of float32 scores, as int64."""
    bits = scores.float().reshape(-1).view(torch.int32).long()
    return torch.where(bits < 0, -bits, bits + 2**31) & 0xFFFFFFFF  # -0 is +0


def topk_histogram(
    scores: Sequence[Tensor], prefix: int, prefix_bits: int, digit_bits: int
) -> Tensor:
    """Concatenate the keys, select by prefix, count the next digit."""
    keys = torch.cat([_keys(s) for s in scores])
    keys = keys[keys >> (32 - prefix_bits) == prefix]
    digits = (keys >> (32 - prefix_bits - digit_bits)) & (2**digit_bits - 1)
    return torch.bincount(digits, minlength=2**digit_bits)


def topk_masks(
    scores: Sequence[Tensor], threshold: float, ties: Sequence[int]
) -> list[Tensor]:
    """Compare, and number the equal entries to keep the first ``ties[i]``."""
    masks = []
    for s, left in zip(scores, ties, strict=True):
        equal = s == threshold
        rank = equal.reshape(-1).cumsum(0).view_as(s)
        masks.append((s > threshold) | (equal & (rank <= left)))
    return masks


def _dense(values: Tensor, rows: Tensor, columns: Tensor, shape: list[int]) -> Tensor:
    weight = values.new_zeros(shape).flatten(1)
    for o, kept in enumerate(weight):
        mine = slice(int(rows[o]), int(rows[o + 1]))
        kept[columns[mine].long()] = values[mine]
    return weight.view(shape)


def sparse_conv2d(
    input: Tensor,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None = None,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Put the values into a dense weight, row by row, and convolve."""
    shape = [rows.numel() - 1, input.shape[1] // groups, *kernel]
    weight = _dense(values, rows, columns, shape)
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        output = output + residual
    return output.relu() if relu else output


def sparse_conv2d_input(
    input_size: Sequence[int],
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    grad: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve zeros and let autograd go back."""
    shape = [rows.numel() - 1, input_size[1] // groups, *kernel]
    weight = _dense(values.detach(), rows, columns, shape)
    input = values.new_zeros(input_size).requires_grad_()
    output = F.conv2d(input, weight, None, stride, padding, dilation, groups)
    return torch.autograd.grad(output, input, grad)[0]


def sparse_conv2d_weight(
    input: Tensor,
    rows: Tensor,
    columns: Tensor,
    grad: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Let autograd find the gradient of a dense weight, and take the kept entries."""
    shape = [rows.numel() - 1, input.shape[1] // groups, *kernel]
    weight = input.new_zeros(shape).requires_grad_()
    output = F.conv2d(input, weight, None, stride, padding, dilation, groups)
    (dense,) = torch.autograd.grad(output, weight, grad)
    ends = pairwise(rows.tolist())
    kept = zip(dense.flatten(1), ends, strict=True)
    return torch.cat([row[columns[a:b].long()] for row, (a, b) in kept])


def batch_norm(
    input: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Measure, normalize, add, cut off; in float32 where entries have 16 bits."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    x = input.to(dtype)
    over = [i for i in range(x.dim()) if i != 1]
    variance, mean = torch.var_mean(x, over, correction=0)
    scale = (variance + eps).rsqrt()
    output = (x - _by_channel(mean, x)) * _by_channel(scale, x)
    if weight is not None:
        output = output * _by_channel(weight, x)
    if bias is not None:
        output = output + _by_channel(bias, x)
    if residual is not None:
        output = output + residual
    return (output.relu() if relu else output).to(input.dtype), mean, scale


def batch_norm_backward(
    grad: Tensor,
    input: Tensor,
    output: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    *,
    relu: bool = False,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the formulas down; in float32 where entries have 16 bits."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    over = [i for i in range(input.dim()) if i != 1]
    g = grad.to(dtype)
    if relu:
        g = torch.where(output <= 0, 0, g)
    x_hat = (input.to(dtype) - _by_channel(mean, input)) * _by_channel(scale, input)
    grad_bias, grad_weight = g.sum(over), (g * x_hat).sum(over)
    count = input.numel() / input.shape[1]
    factor = scale if weight is None else scale * weight
    means = _by_channel(grad_bias, input) + x_hat * _by_channel(grad_weight, input)
    grad_input = _by_channel(factor, input) * (g - means / count)
    grad_residual = g.to(input.dtype) if residual else input.new_empty(0)
    return grad_input.to(input.dtype), grad_residual, grad_weight, grad_bias


def _by_channel(values: Tensor, input: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in input.shape[2:]))


def max_pool2d(
    input: Tensor,
    kernel: Pair,
    stride: Pair | None = None,
    padding: Pair = (0, 0),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Take PyTorch's maxima, and count their places within the windows."""
    stride = stride or kernel
    output, flat = F.max_pool2d(
        input, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True
    )
    top, left = _corners(flat, stride, padding)
    y, x = flat // input.shape[3] - top, flat % input.shape[3] - left
    return output, (y * kernel[1] + x).byte()


def max_pool2d_backward(
    grad: Tensor,
    index: Tensor,
    input_size: Sequence[int],
    kernel: Pair,
    stride: Pair | None = None,
    padding: Pair = (0, 0),
    ceil_mode: bool = False,
) -> Tensor:
    """Add each gradient to the place that it came from."""
    width = input_size[3]
    top, left = _corners(index, stride or kernel, padding)
    place = index.long()
    flat = (place // kernel[1] + top) * width + place % kernel[1] + left
    result = grad.new_zeros(input_size).flatten(2)
    return result.scatter_add(2, flat.flatten(2), grad.flatten(2)).view(input_size)


def _corners(output: Tensor, stride: Pair, padding: Pair) -> list[Tensor]:
    """Return the first row and column of each window."""
    starts = [
        torch.arange(size, device=output.device) * step - pad
        for size, step, pad in zip(output.shape[2:], stride, padding, strict=True)
    ]
    return [starts[0][:, None], starts[1]]


def channel_affine_backward(
    grad: Tensor, input: Tensor, mean: Tensor, scale: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the positions of each channel."""
    d, x = (t.flatten(2) if t.dim() > 2 else t[..., None] for t in (grad, input))
    input_grad = (d * factor[:, None]).view(input.shape)
    return input_grad, (d * (x - mean[:, None])).sum(-1) * scale, d.sum(-1)


def row_moments(rows: Tensor, group_size: int = 1) -> tuple[Tensor, Tensor]:
    """Add up the means of all groups, and their squares."""
    means = rows.unflatten(0, (-1, group_size)).mean(1)
    return means.sum(0), means.square().sum(0)


def lstm(
    ih: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take one step after the other."""
    hidden, cells, gates = [h0], [c0], ih.new_empty(ih.shape)
    for t, x in enumerate(ih.unbind(1)):
        i, f, g, o = F.linear(hidden[-1], weight, bias).add(x).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cells.append(f * cells[-1] + i * g)
        hidden.append(o * cells[-1].tanh())
        gates[:, t] = torch.cat([i, f, g, o], -1)
    states = torch.stack(cells, 1)
    return torch.stack(hidden, 1), states, gates, states[:, 1:].tanh()


def lstm_backward(
    grad: Tensor,
    last: Tensor,
    weight: Tensor,
    cells: Tensor,
    gates: Tensor,
    tanh: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go one step after the other back."""
    delta, d_h, d_c = torch.empty_like(gates), torch.zeros_like(last), last
    for t in reversed(range(grad.shape[1])):
        i, f, g, o = gates[:, t].chunk(4, -1)
        d_h = grad[:, t] + d_h
        d_c = d_c + d_h * o * (1 - tanh[:, t] ** 2)
        parts = (
            d_c * g * i * (1 - i),
            d_c * cells[:, t] * f * (1 - f),
            d_c * i * (1 - g**2),
            d_h * tanh[:, t] * o * (1 - o),
        )
        delta[:, t] = torch.cat(parts, -1)
        d_h, d_c = delta[:, t] @ weight, d_c * f
    return delta, d_h, d_c
