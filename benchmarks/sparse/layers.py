"""Single layers: output and both gradients, against PyTorch's dense and CSR forms.

And against SparseProp's convolutions, in both of its forms, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import race, verify
from benchmarks.sparse.networks import has_bfloat16
from fisherprune import ops

OURS = "fisherprune"
OURS_HALF = "fisherprune, bfloat16"


class Layer(NamedTuple):
    """A convolution of 3 x 3, padded by 1."""

    channels: int
    outputs: int
    size: int
    stride: int


LAYERS = (
    Layer(64, 64, 32, 1),
    Layer(128, 128, 16, 1),
    Layer(256, 256, 8, 1),
    Layer(512, 512, 4, 1),
    Layer(64, 128, 32, 2),
)
KERNEL, PADDING = (3, 3), (1, 1)


class Problem(NamedTuple):
    """A layer's operands."""

    input: Tensor
    weight: Tensor
    grad: Tensor
    values: Tensor
    rows: Tensor
    columns: Tensor
    stride: tuple[int, int]


def innermost(x: Tensor) -> Tensor:
    """Return the tensor with its samples innermost."""
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def problem(layer: Layer, batch: int, density: float) -> Problem:
    """Draw a layer with random kept weights."""
    generator = torch.Generator().manual_seed(layer.channels)
    draw = partial(torch.randn, generator=generator)
    size = layer.size // layer.stride
    weight = draw(layer.outputs, layer.channels, *KERNEL)
    mask = torch.rand(weight.shape, generator=generator) < density
    counts = mask.flatten(1).sum(1)
    return Problem(
        draw(batch, layer.channels, layer.size, layer.size),
        weight * mask,
        draw(batch, layer.outputs, size, size),
        weight[mask],
        F.pad(counts.cumsum(0), (1, 0)).int(),
        mask.flatten(1).nonzero()[:, 1].int(),
        (layer.stride,) * 2,
    )


def sparse_calls(p: Problem, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """Return output and gradients by our ops, of images in a dtype."""
    x, grad = innermost(p.input.to(dtype)), innermost(p.grad.to(dtype))
    form: dict[str, Any] = {"kernel": KERNEL, "stride": p.stride, "padding": PADDING}
    pattern = p.rows, p.columns

    def call() -> list[Tensor]:
        return [
            ops.sparse_conv2d(x, p.values, *pattern, **form),
            ops.sparse_conv2d_input(x.shape, p.values, *pattern, grad, **form),
            ops.sparse_conv2d_weight(x, *pattern, grad, **form),
        ]

    return call


def dense_calls(
    p: Problem, dtype: torch.dtype, form: torch.memory_format
) -> Callable[[], list[Tensor]]:
    """Return the same by PyTorch's dense convolution."""
    x, w, grad = (
        t.to(dtype).contiguous(memory_format=form) for t in (p.input, p.weight, p.grad)
    )
    kept = p.weight != 0

    def call() -> list[Tensor]:
        y = F.conv2d(x, w, None, p.stride, PADDING)
        gx, gw, _ = torch.ops.aten.convolution_backward(
            *(grad, x, w, None, p.stride, PADDING, (1, 1), False, (0, 0), 1),
            (True, True, False),
        )
        return [y, gx, gw]

    def kept_alone() -> list[Tensor]:
        y, gx, gw = call()
        return [y, gx, gw[kept]]

    call.__dict__["checked"] = kept_alone
    return call


def csr_call(p: Problem) -> Callable[[], list[Tensor]]:
    """Return the output alone by PyTorch's CSR tensors: patches times the weight."""
    weight = p.weight.flatten(1).to_sparse_csr()
    size = p.grad.shape[-1]

    def call() -> list[Tensor]:
        patches = F.unfold(p.input, KERNEL, 1, PADDING, p.stride)
        columns = patches.transpose(0, 1).flatten(1)
        y = (weight @ columns).unflatten(1, (len(p.input), -1)).transpose(0, 1)
        return [y.unflatten(2, (size, size))]

    return call


def sparseprop_calls(p: Problem) -> dict[str, Callable[[], list[Tensor]]]:
    """Return the same by SparseProp, by name; none where it is not installed."""
    try:
        from sparseprop.modules import SparseConv2d
    except ImportError:
        return {}
    x = p.input.clone().requires_grad_()

    def form(over_positions: bool) -> Callable[[], list[Tensor]]:
        module = SparseConv2d(
            *(p.weight, None, PADDING[0], p.stride[0]),
            vectorizing_over_on=over_positions,
        )

        def call() -> list[Tensor]:
            y = module(x)
            return [y.detach(), *torch.autograd.grad(y, [x, module.W_val], p.grad)]

        return call

    return {
        "SparseProp, vectors of samples": form(False),
        "SparseProp, vectors of positions": form(True),
    }


def compare(batch: int, densities: list[float], rounds: int) -> list[dict[str, Any]]:
    """Race all ways for every layer and density."""
    rows = []
    forms = {
        "contiguous": torch.contiguous_format,
        "channels_last": torch.channels_last,
    }
    for layer in LAYERS:
        for density in densities:
            p = problem(layer, batch, density)
            calls = {
                OURS: sparse_calls(p, torch.float32),
                OURS_HALF: sparse_calls(p, torch.bfloat16),
                "CSR, output alone": csr_call(p),
            }
            calls |= sparseprop_calls(p)
            for name, form in forms.items():
                calls[f"dense, {name}"] = dense_calls(p, torch.float32, form)
            if has_bfloat16():
                calls["dense, channels_last, bfloat16"] = dense_calls(
                    p, torch.bfloat16, torch.channels_last
                )
            rows += _rows(layer, batch, density, p, calls, rounds)
    return rows


def _rows(
    layer: Layer,
    batch: int,
    density: float,
    p: Problem,
    calls: dict[str, Callable[[], list[Tensor]]],
    rounds: int,
) -> list[dict[str, Any]]:
    double = p._replace(
        input=p.input.double(), weight=p.weight.double(), grad=p.grad.double()
    )
    exact = dense_calls(double, torch.float64, torch.contiguous_format)
    truth = exact.__dict__["checked"]()

    def check(what: str, found: list[Tensor]) -> None:
        found = calls[what].__dict__.get("checked", lambda: found)()
        limit = 2e-2 if "bfloat16" in what else 1e-6 if what == OURS else 1e-5
        for part, wanted in zip(found, truth, strict=False):
            verify(what, part.double(), wanted, tolerance=limit)

    times = race(calls, check, rounds=rounds)
    ours = times[OURS].median
    name = f"{layer.channels}-{layer.outputs}, {layer.size} x {layer.size}"
    place = {"case": "layer", "layer": f"{name} / {layer.stride}", "batch": batch}
    return [
        place
        | {"kept": density, "what": what}
        | time.row()
        | {"to ours": time.median / ours}
        for what, time in times.items()
    ]
