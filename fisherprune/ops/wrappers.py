"""The two ops and their steps: typed thin wrappers over ``torch.ops.fisherprune``.

Meaning lives here, arithmetic in ``csrc/``; ``reference.py`` has a pure-PyTorch twin of
every op, with the same signature.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.ops import kernels as kernels  # registers the ops

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
    r"""Accumulate first and second moments of a layer's per-sample weight gradients.

    With :math:`G_j` the weight gradient of the j-th ``group_size`` consecutive samples,
    averaged over the samples of the group (a smaller last group over its own)::

        sum    += sum_j G_j
        sum_sq += sum_j G_j * G_j

    No per-sample gradient is ever stored: the memory is that of the accumulators.
    Deterministic bit for bit on a given device, whatever the number of threads.

    The CPU computes in float32. A GPU multiplies in TF32 (about three decimal digits)
    where torch does so for the layer itself, that is where
    ``torch.backends.cudnn.conv.fp32_precision`` (convolutions) or
    ``torch.backends.cuda.matmul.fp32_precision`` (linear layers) is ``"tf32"``, and to
    float32 precision elsewhere; it adds in float32 in either case. For linear layers
    with one position a sample and groups of one, ``sum_sq`` is the product of the
    operands' squares, which float32 must hold, too.

    Args:
        input: the layer's input, ``[N, C, H, W]`` for a convolution or ``[N, *, in]``
            for a linear layer with any positions ``*``; float32, float16 or bfloat16,
            any strides.
        grad: gradient with respect to the layer's output, ``[N, O, P, Q]`` or
            ``[N, *, out]``.
        sum: accumulator, contiguous float32 of the weight's shape,
            ``[O, C / groups, Y, X]`` or ``[out, in]``; updated in place.
        sum_sq: accumulator of the squares, like ``sum``.
        stride: of the convolution.
        padding: of the convolution, zeros on both sides.
        dilation: of the convolution.
        groups: of the convolution.
        group_size: samples averaged before squaring; 1 gives the empirical Fisher
            diagonal.

    Raises:
        RuntimeError: on shapes that do not belong together, other dtypes, or
            accumulators that share memory with an input.
    """
    linear = sum.dim() == 2
    if linear:
        input, grad = _positions_as_image(input), _positions_as_image(grad)
        sum, sum_sq = sum[:, :, None, None], sum_sq[:, :, None, None]
    torch.ops.fisherprune.grad_moments.default(
        input,
        grad,
        sum,
        sum_sq,
        stride,
        padding,
        dilation,
        groups,
        group_size,
        _tf32_allowed(linear),
    )


_LINEAR_PRECISION = attrgetter("cuda.matmul.fp32_precision")  # no type hints have it
_CONV_PRECISION = attrgetter("cudnn.conv.fp32_precision")


def _tf32_allowed(linear: bool) -> bool:
    """Return torch's own setting for the operation whose gradient it is."""
    precision = _LINEAR_PRECISION if linear else _CONV_PRECISION
    return precision(torch.backends) == "tf32"


def _positions_as_image(x: Tensor) -> Tensor:
    """View ``[N, *, features]`` as the ``[N, features, T, 1]`` image of a 1x1 conv."""
    positions = x.shape[1:-1].numel()
    return x.reshape(x.shape[0], positions, x.shape[-1]).mT.unsqueeze(-1)


def global_topk(
    scores: Sequence[Tensor],
    keep: Sequence[int],
    names: Sequence[str] | None = None,
    *,
    ranks: Sequence[int] = (),
) -> tuple[list[list[Tensor]], Tensor]:
    """Select the ``keep`` largest entries over all score tensors taken together.

    Exact and deterministic: for each k in ``keep`` exactly k entries are kept, of
    equal ones those of the lowest flat index in the order of ``scores``; +0 equals -0.
    Nothing is concatenated or sorted, and several k share the passes over the scores.
    Contiguous scores are read where they are; others, those in channels_last too, are
    copied first, because the flat index is that of the shape.

    Args:
        scores: float32 tensors of any shapes on one device.
        keep: how many entries to keep, each in ``[0, total]``.
        names: of the tensors, for messages.
        ranks: further k, each in ``[0, total]``, whose k-th largest value is wanted,
            but no masks.

    Returns:
        For each k in ``keep`` one list of bool masks shaped like the scores (True =
        kept), and the k-th largest values, those of ``keep`` and then of ``ranks``,
        float32 ``[len(keep) + len(ranks)]`` (infinity for k = 0).

    Raises:
        FisherpruneError: where a score is NaN or infinite.
        RuntimeError: where k is out of range, or the scores are none, not float32, or
            on several devices.

    Example:
        >>> import torch
        >>> scores = [torch.tensor([0.3, 0.1]), torch.tensor([0.2, 0.9])]
        >>> [masks], thresholds = global_topk(scores, [2], ranks=[1, 4])
        >>> [mask.tolist() for mask in masks], thresholds
        ([[True, False], [False, True]], tensor([0.3000, 0.9000, 0.1000]))
    """
    scores = _score_list("global_topk", scores)
    masks, thresholds, nonfinite = torch.ops.fisherprune.global_topk(
        scores, list(keep), list(ranks)
    )
    refuse_nonfinite(nonfinite.tolist(), scores, names)
    n = len(scores)
    return [masks[i * n : (i + 1) * n] for i in range(len(keep))], thresholds


def refuse_nonfinite(
    counts: Sequence[int], scores: Sequence[Tensor], names: Sequence[str] | None
) -> None:
    """Refuse NaN and infinities that the op ``global_topk`` has counted.

    Args:
        counts: the entries of the op's third result, one for each tensor.
        scores: the tensors.
        names: of the tensors, for messages.

    Raises:
        FisherpruneError: where a count is not 0.
    """
    for i, count in enumerate(counts):
        if count:
            raise FisherpruneError(
                f"global_topk: scores[{(names[i] if names else i)!r}] must be finite, "
                f"{count} of {scores[i].numel()} entries are NaN or infinite"
            )


def _score_list(op: str, scores: Sequence[Tensor]) -> list[Tensor]:
    """Check what the dispatcher needs to choose the op's kernel: one device."""
    scores = list(scores)
    if not scores:
        raise RuntimeError(f"{op}: scores must hold at least one tensor")
    device = scores[0].device
    for i, s in enumerate(scores):
        if s.device != device:
            raise RuntimeError(
                f"{op}: scores[{i}] must be on {device} like scores[0], got {s.device}"
            )
    return scores


def topk_histogram(
    scores: Sequence[Tensor], prefix: int, prefix_bits: int, digit_bits: int
) -> Tensor:
    """Count the next digit of the scores whose keys begin with ``prefix``.

    The step of ``global_topk`` whose results may be added over devices. The key of a
    float32 is its order-preserving image among the 32-bit unsigned integers.

    Args:
        scores: float32 tensors of any shapes on one device.
        prefix: the leading bits of the keys to count, in ``[0, 2 ** prefix_bits)``.
        prefix_bits: how many they are, in ``[0, 32 - digit_bits]``.
        digit_bits: width of the digit behind the prefix, in ``[1, 16]``.

    Returns:
        int64 ``[2 ** digit_bits]`` on the scores' device.

    Raises:
        RuntimeError: where an argument is out of its range, or the scores are none, not
            float32, or on several devices.
    """
    return torch.ops.fisherprune.topk_histogram(
        _score_list("topk_histogram", scores), prefix, prefix_bits, digit_bits
    )


def topk_masks(
    scores: Sequence[Tensor], threshold: float, ties: Sequence[int]
) -> list[Tensor]:
    """Mask scores above ``threshold`` and the first ``ties[i]`` that equal it in each.

    Args:
        scores: float32 tensors of any shapes on one device.
        threshold: any float but NaN; +0 equals -0.
        ties: for each tensor how many of the entries that equal the threshold to keep,
            at least 0, those of the lowest flat index; all where there are fewer.

    Returns:
        One bool mask per score tensor, True = kept.

    Raises:
        RuntimeError: where the threshold is NaN, ``ties`` is negative or not one per
            tensor, or the scores are none, not float32, or on several devices.
    """
    return torch.ops.fisherprune.topk_masks(
        _score_list("topk_masks", scores), threshold, list(ties)
    )


def key_value(key: int) -> float:
    """Return the float32 whose key (see ``topk_histogram``) is ``key``."""
    bits = key & 0x7FFFFFFF if key >> 31 else -key & 0xFFFFFFFF
    return struct.unpack("<f", struct.pack("<I", bits))[0]


@torch.library.register_fake("fisherprune::grad_moments")
def _(
    input: Tensor,
    grad: Tensor,
    sum: Tensor,
    sum_sq: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    group_size: int,
    allow_tf32: bool = False,
) -> None:
    for name, x in (("grad", grad), ("sum", sum), ("sum_sq", sum_sq)):
        if x.device != input.device:
            raise RuntimeError(
                f"grad_moments: {name} must be on the device of input, {input.device}, "
                f"got {x.device}"
            )
    return None


@torch.library.register_fake("fisherprune::global_topk")
def _(
    scores: list[Tensor], keep: Sequence[int], ranks: Sequence[int] = ()
) -> tuple[list[Tensor], Tensor, Tensor]:
    _score_list("global_topk", scores)
    return (
        [s.new_empty(s.shape, dtype=torch.bool) for _ in keep for s in scores],
        scores[0].new_empty(len(keep) + len(ranks)),
        scores[0].new_empty(len(scores), dtype=torch.int64),
    )


@torch.library.register_fake("fisherprune::topk_histogram")
def _(scores: list[Tensor], prefix: int, prefix_bits: int, digit_bits: int) -> Tensor:
    _score_list("topk_histogram", scores)
    return scores[0].new_empty(1 << digit_bits, dtype=torch.int64)


@torch.library.register_fake("fisherprune::topk_masks")
def _(scores: list[Tensor], threshold: float, ties: Sequence[int]) -> list[Tensor]:
    _score_list("topk_masks", scores)
    return [s.new_empty(s.shape, dtype=torch.bool) for s in scores]
