"""Sparse convolutions for tests, plain data for every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor


def _samples_innermost(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "samples_innermost": lambda x: (
        x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    ),
    "columns": lambda x: x.mT.contiguous().mT,
    "gaps": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "odd_start": lambda x: F.pad(x, (1, 0))[..., 1:],
    "one_sample_expanded": lambda x: x[:1].expand_as(x),
    "one_channel_expanded": lambda x: x[:, :1].expand_as(x),
    "one_position_expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}

CASES: dict[str, dict] = {
    "plain_3x3": dict(n=8, c=16, o=12, size=(9, 8), kernel=(3, 3), padding=(1, 1)),
    "many_samples": dict(n=40, c=7, o=9, size=(4, 4), kernel=(3, 3), padding=(1, 1)),
    "odd_samples": dict(n=17, c=6, o=5, size=(7, 5), kernel=(3, 3), padding=(1, 1)),
    "one_sample": dict(n=1, c=6, o=5, size=(7, 5), kernel=(3, 3), padding=(1, 1)),
    "stride_2": dict(
        n=16, c=6, o=10, size=(9, 8), kernel=(3, 3), stride=(2, 2), padding=(1, 1)
    ),
    "pointwise": dict(n=16, c=30, o=20, size=(5, 5), kernel=(1, 1)),
    "pointwise_stride_2": dict(
        n=5, c=12, o=20, size=(7, 6), kernel=(1, 1), stride=(2, 2)
    ),
    "linear": dict(n=33, c=50, o=40, size=(1, 1), kernel=(1, 1)),
    "conv1d": dict(n=9, c=8, o=6, size=(1, 20), kernel=(1, 5), padding=(0, 2)),
    "depthwise": dict(
        n=6, c=8, o=8, size=(6, 6), kernel=(3, 3), padding=(1, 1), groups=8
    ),
    "everything_uneven": dict(
        n=13,
        c=6,
        o=10,
        size=(13, 9),
        kernel=(3, 2),
        stride=(2, 3),
        padding=(2, 1),
        dilation=(3, 2),
        groups=2,
    ),
    "large_kernel": dict(n=4, c=3, o=6, size=(12, 12), kernel=(7, 7), stride=(2, 2)),
    "one_large_image": dict(
        n=1, c=20, o=34, size=(40, 41), kernel=(3, 3), padding=(1, 1), groups=2
    ),
    "few_samples_stride_2": dict(
        n=3, c=9, o=20, size=(21, 24), kernel=(3, 3), stride=(2, 2), padding=(1, 1)
    ),
    "many_columns": dict(
        n=2, c=3, o=4, size=(3, 30), kernel=(1, 11), padding=(0, 5), dilation=(1, 2)
    ),
    "padding_beyond_kernel": dict(
        n=3, c=2, o=4, size=(3, 2), kernel=(2, 2), padding=(3, 4)
    ),
}


@dataclass
class Case:
    """A convolution with a mask over its weight."""

    input: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    options: dict

    @property
    def pattern(self) -> tuple[Tensor, Tensor]:
        """Return rows and columns of the kept entries."""
        return pattern_of(self.mask)

    @property
    def values(self) -> Tensor:
        """Return the kept entries."""
        return self.weight[self.mask]

    @property
    def call(self) -> dict:
        """Return the options of the ops."""
        return {"kernel": tuple(self.weight.shape[2:]), **self.options}

    def flat(self) -> list:
        """Return the options as the registered ops take them."""
        names = "kernel", "stride", "padding", "dilation", "groups"
        return [self.call[name] for name in names]

    def dense(self, relu: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Return the masked dense convolution in float64, and its leaves."""
        leaves = [self.input, self.weight] + [self.bias] * (self.bias is not None)
        leaves = [t.detach().double().contiguous().requires_grad_() for t in leaves]
        return self._convolved(leaves, relu), leaves

    def _convolved(self, leaves: list[Tensor], relu: bool = False) -> Tensor:
        x, w, *b = leaves
        out = F.conv2d(x, w * self.mask, *b, **self.options)
        return out.relu() if relu else out

    def truth(self, grad: Tensor) -> list[Truth]:
        """Return the output and the gradients of input, values and bias."""
        grad, found = grad.detach().double(), []
        _, leaves = self.dense()
        squares = [t.detach().square().requires_grad_() for t in leaves]
        for inner, outer in ((leaves, grad), (squares, grad.square())):
            out = self._convolved(inner)
            by_input, by_weight, *by_bias = torch.autograd.grad(out, inner, outer)
            found.append([out.detach(), by_input, by_weight[self.mask], *by_bias])
        return [Truth(*pair) for pair in zip(*found, strict=True)]


@dataclass
class Truth:
    """Sums, and the sums of their squared terms."""

    sums: Tensor
    squares: Tensor

    def error(self, found: Tensor) -> float:
        """Return the norm of an error, relative to what rounding can be expected of.

        That is the norm of the sums, or where terms cancel out, of the terms.
        """
        error = (found.detach().cpu().double() - self.sums).norm().item()
        scale = max(self.sums.norm().item(), self.squares.sum().sqrt().item())
        return error / scale if scale else error


def pattern_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns of a mask, entry by entry."""
    rows, columns = [0], []
    for row in mask.flatten(1).tolist():
        columns += [i for i, kept in enumerate(row) if kept]
        rows.append(len(columns))
    return tuple(torch.tensor(x, dtype=torch.int32) for x in (rows, columns))


def make(
    n: int,
    c: int,
    o: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    density: float = 0.2,
    bias: bool = True,
    empty_rows: float = 0.2,
    seed: int | None = None,
) -> Case:
    """Draw a case; some rows keep nothing."""
    generator = torch.Generator().manual_seed(
        int(torch.randint(2**31, ())) if seed is None else seed
    )
    drawn = {"generator": generator}
    weight = torch.randn(o, c // groups, *kernel, **drawn)
    mask = torch.rand(weight.shape, **drawn) < density
    mask &= torch.rand(o, 1, 1, 1, **drawn) >= empty_rows
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    biases = torch.randn(o, **drawn) if bias else None
    return Case(torch.randn(n, c, *size, **drawn), weight, mask, biases, options)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw, most: int = 40) -> dict:
    """Draw the arguments of ``make``, of at most so many samples."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    return dict(
        n=draw(st.integers(1, most)),
        c=groups * draw(st.integers(1, 12)),
        o=groups * draw(st.integers(1, 12)),
        size=(draw(st.integers(7, 11)), draw(st.integers(7, 11))),
        kernel=draw(pairs),
        stride=draw(pairs),
        padding=draw(st.tuples(st.integers(0, 4), st.integers(0, 4))),
        dilation=draw(pairs),
        groups=groups,
        density=draw(st.sampled_from([0.0, 0.01, 0.1, 0.4, 1.0])),
        bias=draw(st.booleans()),
        empty_rows=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 2**32)),
    )
