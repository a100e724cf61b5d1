"""The ops on a GPU: the cases of the CPU, and what only a device can get wrong."""

import dense_cases
import lanes_cases
import pytest
import torch
from gpus import needs_gpu
from lanes_cases import PIXELS
from moment_cases import (
    CASES,
    LAYOUTS,
    STORED,
    accumulators,
    expanded,
    make,
    vectors_that_end_within_a_row,
)
from topk_cases import VALUES, case
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from window_cases import CASES as WINDOW_CASES

from fisherprune import ops
from fisherprune.errors import FisherpruneError
from fisherprune.ops import reference


class Asked(TorchDispatchMode):
    """Notes whether ``grad_moments`` was allowed to multiply in TF32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fisherprune.grad_moments.default:
            self.tf32 = args[9:] == (True,)  # defaults at the end are left out
        return func(*args, **kwargs or {})


def tf32_of(*shape):
    """Return whether it may multiply a weight's gradients of this shape in TF32."""
    x = torch.ones(2, *shape[1:])
    grad = torch.ones(2, shape[0], *(1 for _ in shape[2:]))
    with Asked() as asked:
        ops.grad_moments(x, grad, torch.zeros(shape), torch.zeros(shape))
    return asked.tf32


def test_tf32_follows_torch(tf32):
    linear, conv = (3, 4), (3, 4, 2, 2)
    for precision in ("tf32", "ieee"):
        tf32(precision)
        assert tf32_of(*linear) == tf32_of(*conv) == (precision == "tf32")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert tf32_of(*linear) and not tf32_of(*conv)


# ---- grad_moments ----


ALL_CASES = {
    **CASES,
    **WINDOW_CASES,
    **lanes_cases.CASES,
    **lanes_cases.PLANES,
    **PIXELS,
    **dense_cases.POINTWISE,
}


def on_gpu(input, grad, weight, options):
    """Return sum and sum_sq of the op on the GPU."""
    got = [a.cuda() for a in accumulators(weight)]
    ops.grad_moments(input.cuda(), grad.cuda(), *got, **options)
    return [g.cpu() for g in got]


def truth_of(input, grad, weight, options, device="cpu"):
    """Return the same in float64, by plain PyTorch."""
    truth = [a.double().to(device) for a in accumulators(weight)]
    reference.grad_moments(input.to(device), grad.to(device), *truth, **options)
    return [t.cpu() for t in truth]


def errors(results, truths):
    return [
        ((r - t).norm() / t.norm()).item() if t.numel() else 0.0
        for r, t in zip(results, truths, strict=True)
    ]


@needs_gpu
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 1e-5), ("tf32", 2e-3)])
@pytest.mark.parametrize("name", ALL_CASES)
def test_moments(name, precision, bound, tf32):
    tf32(precision)
    case = make(**ALL_CASES[name])
    assert max(errors(on_gpu(*case), truth_of(*case))) <= bound


@needs_gpu
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 1e-5), ("tf32", 2e-3)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [*STORED, "8_wide", "32_wide", *lanes_cases.CASES, *PIXELS, *dense_cases.POINTWISE],
)
def test_moments_of_every_layout(name, layout, precision, bound, tf32):
    tf32(precision)
    input, grad, *rest = make(**ALL_CASES[name])
    stored = [LAYOUTS[layout](x.cuda()) for x in (input, grad)]
    assert max(errors(on_gpu(*stored, *rest), truth_of(input, grad, *rest))) <= bound


@needs_gpu
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 1e-5), ("tf32", 2e-3)])
def test_moments_of_views(precision, bound, tf32):
    """Expanded tensors, and copies that end within sixteen bytes."""
    tf32(precision)
    for view in (expanded("cuda"), *vectors_that_end_within_a_row("cuda")):
        assert max(errors(on_gpu(*view), truth_of(*view))) <= bound


@needs_gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("group_size", [40, 200, 300, 1000])
@pytest.mark.parametrize("size", [2, 8, 16])
def test_groups_shared_by_blocks(size, group_size, precision, tf32):
    """Few groups, the last one small; the batch as one; twice, for equal bits."""
    tf32(precision)
    case = make(n=300, c=64, o=64, size=(size, size), kernel=(3, 3), padding=(1, 1))
    case[-1]["group_size"] = group_size
    got, truth = on_gpu(*case), truth_of(*case, device="cuda")
    assert max(errors(got, truth)) <= (1e-5 if precision == "ieee" else 2e-3)
    assert all(map(torch.equal, got, on_gpu(*case)))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "name",
    [*WINDOW_CASES, *lanes_cases.CASES, *PIXELS, *dense_cases.POINTWISE],
)
def test_moments_of_images_in_16_bits(name, layout, dtype, tf32):
    """All their bits are in a TF32: only sums are cut off."""
    tf32("tf32")
    *pair, weight, options = make(**ALL_CASES[name], dtype=dtype)
    case = *(x.contiguous(memory_format=layout) for x in pair), weight, options
    assert max(errors(on_gpu(*case), truth_of(*case))) <= 3e-5


@needs_gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", dense_cases.CASES)
def test_moments_of_sequences(name, dtype, precision, tf32):
    tf32(precision)
    input, grad, weight, options = make(**dense_cases.CASES[name], dtype=dtype)
    if len(weight) == 4:
        input, grad = map(LAYOUTS["channels_last"], (input, grad))
    case = input, grad, weight, options
    got, rounded = on_gpu(*case), precision == "tf32" and dtype == torch.float32
    assert max(errors(got, truth_of(*case))) <= (2e-3 if rounded else 1e-5)
    assert all(map(torch.equal, got, on_gpu(*case)))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("n", "c", "o", "size", "kernel", "stride"),
    [
        *((64, 64, 64, 56, 3, 1), (64, 128, 128, 28, 3, 1), (64, 256, 256, 14, 3, 1)),
        *((64, 512, 512, 7, 3, 1), (64, 128, 128, 56, 3, 2), (64, 512, 512, 14, 3, 2)),
        *((64, 256, 64, 56, 1, 1), (64, 512, 2048, 7, 1, 1), (64, 64, 64, 32, 3, 1)),
        *((64, 256, 512, 56, 1, 2), (64, 1024, 2048, 14, 1, 2)),
    ],
)
def test_moments_of_layers_of_large_images(
    n, c, o, size, kernel, stride, layout, dtype, tf32
):
    """Full tiles, bands and splits; twice, for equal bits."""
    tf32("tf32")
    window = dict(kernel=(kernel,) * 2, padding=(kernel // 2,) * 2)
    shape = dict(n=n, c=c, o=o, size=(size, size), stride=(stride,) * 2, **window)
    case = make(**shape, dtype=dtype)
    case = *(x.contiguous(memory_format=layout) for x in case[:2]), *case[2:]
    got, truth = on_gpu(*case), truth_of(*case, device="cuda")
    assert max(errors(got, truth)) <= 2e-3
    assert all(map(torch.equal, got, on_gpu(*case)))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_of_half_precision(dtype, layout, tf32):
    tf32("ieee")
    input, grad, *rest = make(**CASES["stride_2"], dtype=dtype)
    case = [x.contiguous(memory_format=layout) for x in (input, grad)] + rest
    assert max(errors(on_gpu(*case), truth_of(*case))) <= 1e-5


@needs_gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(
    ("n", "c", "o", "size"),
    [
        *((200, 64, 64, 32), (100, 128, 128, 16), (200, 256, 256, 8)),
        *((300, 256, 256, 4), (64, 512, 512, 4), (64, 512, 512, 2)),
    ],
)
def test_moments_of_network_layers(n, c, o, size, precision, tf32):
    """Full tiles and splits; twice, for equal bits."""
    tf32(precision)
    case = make(n=n, c=c, o=o, size=(size, size), kernel=(3, 3), padding=(1, 1))
    got, truth = on_gpu(*case), truth_of(*case, device="cuda")
    assert max(errors(got, truth)) <= (1e-5 if precision == "ieee" else 2e-3)
    assert all(map(torch.equal, got, on_gpu(*case)))


@needs_gpu
@pytest.mark.parametrize("name", ["plain_3x3", "8_wide"])
def test_offsets_beyond_32_bits(name, tf32):
    """Samples that lie four gigabytes apart."""
    tf32("tf32")
    input, grad, weight, options = make(**ALL_CASES[name])
    far = torch.empty(3, 2**30 + 64, device="cuda")
    spread = far[:, : input[0].numel()].view(input.shape)
    spread.copy_(input)
    results = []
    for x in (spread, input.cuda()):
        got = [torch.zeros(weight, device="cuda") for _ in range(2)]
        ops.grad_moments(x, grad.cuda(), *got, **options)
        results.append(got)
    assert all(map(torch.equal, *results))


@needs_gpu
def test_mixed_devices_are_refused():
    input, grad, weight, options = make(**CASES["plain_3x3"])
    sums = [torch.zeros(weight, device="cuda") for _ in range(2)]
    with pytest.raises(RuntimeError, match="grad must be on the device of input"):
        torch.ops.fisherprune.grad_moments.default(
            input.cuda(), grad, *sums, (1, 1), (1, 1), (1, 1), 1, 1
        )


# ---- global_topk ----


def assert_topk(scores, keep, ranks=()):
    masks, thresholds = ops.global_topk([s.cuda() for s in scores], keep, ranks=ranks)
    expected, levels = reference.global_topk(scores, keep, ranks=ranks)
    assert torch.equal(thresholds.cpu(), levels)
    for got, want in zip(masks, expected, strict=True):
        assert all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))


@needs_gpu
@pytest.mark.parametrize("n", [37, 300_000])
@pytest.mark.parametrize("name", VALUES)
def test_topk(name, n):
    scores, keep = case(name, n)
    scores = [torch.from_numpy(s) for s in scores]
    assert_topk(scores, keep)
    assert_topk(scores, keep[:2], ranks=keep[2:])
    assert_topk(scores, [], ranks=keep)


@needs_gpu
def test_topk_of_many_tensors_and_selections():
    values = torch.randint(50, (20_000,)).float()
    scores = list(values.split([19] * 1052 + [12]))
    assert_topk(scores, list(range(0, 20_001, 1250)))


@needs_gpu
def test_topk_of_other_layouts():
    x = torch.randn(20, 30, 3, 3).round(decimals=1)
    assert_topk([x.contiguous(memory_format=torch.channels_last), x[:, 1:]], [900])


@needs_gpu
def test_topk_of_more_scores_than_32_bits_count():
    """One tensor nine times, an eighth of it ones; the zeros run out in the ninth."""
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of the GPU's memory")
    n, ties = 1 << 28, 12_345
    scores = torch.zeros(n, device="cuda")
    scores[::8] = 1
    keep = n // 8 * 9 + n // 8 * 7 * 8 + ties
    assert keep > 2**31
    (masks,), threshold = ops.global_topk([scores] * 9, [keep])
    assert threshold.tolist() == [0.0]
    assert all(mask.all() for mask in masks[:8])
    wanted = scores == 1
    wanted[: (ties - 1) // 7 * 8 + 1 + (ties - 1) % 7 + 1] = True  # zeros are 1 to 7
    assert int(wanted.sum()) == n // 8 + ties
    assert torch.equal(masks[8], wanted)


@needs_gpu
def test_topk_does_not_wait_for_the_device():
    scores = [torch.randn(5000, device="cuda"), torch.randn(30, 3, device="cuda")]
    torch.ops.fisherprune.global_topk(scores, [7, 900])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.fisherprune.global_topk(scores, [7, 900])
    finally:
        torch.cuda.set_sync_debug_mode(before)


@needs_gpu
def test_opcheck_of_topk():
    scores = [torch.randn(5, 3), torch.randn(0), torch.randn(8, 2).T]
    scores, op = [s.cuda() for s in scores], torch.ops.fisherprune
    opcheck(op.global_topk, (scores, [0, 4, 31]))
    opcheck(op.global_topk, (scores, [4], [0, 31]))
    opcheck(op.topk_histogram, (scores, 1, 1, 8))
    opcheck(op.topk_masks, (scores, 0.5, [1, 0, 2]))


@needs_gpu
def test_nonfinite_scores_are_refused():
    scores = [torch.zeros(9, device="cuda"), torch.zeros(20_000, device="cuda")]
    scores[1][[3, 19_999]] = torch.tensor([float("nan"), float("inf")], device="cuda")
    with pytest.raises(FisherpruneError, match=r"scores\[1\] must be finite, 2 of"):
        ops.global_topk(scores, [5])


@needs_gpu
def test_steps_of_topk():
    arrays, _ = case("few_distinct", 50_000)
    scores = [torch.from_numpy(s) for s in arrays]
    on_device = [s.cuda() for s in scores]
    for digits in [(0, 0, 11), (0, 0, 16), (3, 2, 10), (6, 3, 1)]:
        got = ops.topk_histogram(on_device, *digits)
        assert torch.equal(got.cpu(), reference.topk_histogram(scores, *digits))
    ties = [7, 10**6, 0, *[500] * len(scores)][: len(scores)]
    got = ops.topk_masks(on_device, 0.5, ties)
    for g, w in zip(got, reference.topk_masks(scores, 0.5, ties), strict=True):
        assert torch.equal(g.cpu(), w)


# ---- batch_norm ----


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 3, 0), (0, 2, 3, 1)])
def test_batch_norm(order, dtype):
    """The same as on the CPU, in the layout of the input, and opcheck."""
    inverse = [order.index(i) for i in range(4)]
    x, residual, grad = (
        torch.randn(9, 5, 4, 7).to(dtype).permute(order).contiguous().permute(inverse)
        for _ in range(3)
    )
    weight, bias = torch.randn(2, 5)
    found = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, residual, weight, bias)]
        y, mean, scale = ops.batch_norm(*leaves, relu=True)
        grads = torch.autograd.grad(y, leaves, grad.to(device))
        assert y.stride() == grads[0].stride() == grads[1].stride() == x.stride()
        found.append([t.detach().cpu().float() for t in (y, mean, scale, *grads)])
    bound = 1e-5 if dtype == torch.float32 else 2**-6
    assert max(errors(found[1], found[0])) <= bound
    opcheck(torch.ops.fisherprune.batch_norm, (*leaves, 1e-5, True))


# ---- max_pool2d ----


@needs_gpu
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool2d(ceil_mode):
    """The same entries and gradients as on the CPU."""
    x = torch.randn(5, 7, 9, 6).permute(3, 0, 1, 2)  # samples innermost
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        y = ops.max_pool2d(leaf, (3, 2), (2, 2), (1, 1), ceil_mode)[0]
        (grad,) = torch.autograd.grad(y.square().sum(), leaf)
        found.append([t.detach().cpu() for t in (y, grad)])
    assert max(errors(found[1], found[0])) <= 1e-6
