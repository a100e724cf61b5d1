"""Gradient moments of all parameters of many kinds of networks.

``python -m benchmarks.zoo`` compares a pass over a few batches with a plain forward and
backward pass over them, for each network, and with torch.func, which makes all
per-sample gradients of one batch. A pass over one batch tells what the first one costs
and what each further one does. Plain passes in which the first parameter alone has a
gradient tell what is left without those of parameters, by PyTorch's own layers.
Before anything is timed, the Fisher diagonal of a few samples is compared with a
float64 loop over them. Language models are those of transformers, built from
configurations; without it, their rows are left out.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import fisherprune as fp
from benchmarks.harness import ceilings, peak_extra_bytes, race, verify
from benchmarks.record import arguments, finish, program

OURS, PLAIN, PEER = "fisherprune", "forward + backward", "vmap(grad)"
FIRST = "fisherprune, first batch"
LEAST = "forward + backward to the first parameter"
PASS = 4  # batches in a pass
LOOKED_AT = 3  # samples of the float64 loop
TOLERANCE = 5e-2
"""Of the Fisher diagonal: a ReLU that rounds to its other side changes it."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Network:
    """A network and its batches.

    Attributes:
        name: in the table.
        build: makes it.
        inputs: draws as many samples' inputs as it is asked for.
        classes: of the labels; 0: the next token is the label.
        batch: samples in a batch.
        peer: whether vmap(grad) can run it.
        layout: of images, and of the kernels of convolutions.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int
    classes: int = 10
    peer: bool = True
    layout: torch.memory_format = torch.preserve_format

    def batches(self, count: int) -> list[Batch]:
        """Draw batches."""
        torch.manual_seed(0)
        drawn = []
        for _ in range(count):
            x = self.inputs(self.batch).to(memory_format=self.layout)
            y = torch.randint(self.classes, (self.batch,)) if self.classes else x
            drawn.append((x, y))
        return drawn


class Logits(nn.Module):
    """A language model that returns its scores for the next token, ``[N, V, T]``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the model."""
        return self.model(tokens, use_cache=False).logits.mT


class Recurrent(nn.Module):
    """An LSTM of two layers that classifies sequences of tokens."""

    def __init__(self, width: int = 256, tokens: int = 1000):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify by the mean over time."""
        return self.head(self.lstm(self.embedding(tokens))[0].mean(1))


def by_einsum(x: Tensor, weight: Tensor) -> Tensor:
    """``[N, T, in] -> [N, T, out]``."""
    return torch.einsum("nti,io->nto", x, weight)


def by_tensordot(x: Tensor, weight: Tensor) -> Tensor:
    """Return the same."""
    return torch.tensordot(x, weight, 1)


def by_inner(x: Tensor, weight: Tensor) -> Tensor:
    """Return the like of it, by ``[out, in]``."""
    return torch.inner(x, weight)


def by_maximum(x: Tensor, weight: Tensor) -> Tensor:
    """Return the larger ones, by ``[T, in]``: a function for which there is no rule."""
    return torch.maximum(x, weight)


class Products(nn.Module):
    """Layers of a function."""

    def __init__(
        self,
        product: Callable[[Tensor, Tensor], Tensor],
        rows: int = 128,
        width: int = 128,
        depth: int = 4,
    ):
        super().__init__()
        self.product = product
        scale = width**-0.5
        self.weights = nn.ParameterList(
            torch.randn(rows, width) * scale for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to ten classes."""
        for weight in self.weights:
            x = torch.tanh(self.product(x, weight))
        return x.mean(1)[:, :10]


def next_token(outputs: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean loss over all positions but the last."""
    return F.cross_entropy(outputs[..., :-1], tokens[:, 1:])


def images(size: int) -> Callable[[int], Tensor]:
    """Draw images."""
    return lambda n: torch.randn(n, 3, size, size)


def tokens(length: int, known: int) -> Callable[[int], Tensor]:
    """Draw sequences of tokens."""
    return lambda n: torch.randint(known, (n, length))


def torchvision(name: str, size: int, batch: int, **options: Any) -> Network:
    """Return one of torchvision's networks."""
    build = partial(models.get_model, name, weights=None, num_classes=10, **options)
    return Network(name, build, images(size), batch)


def small_vit() -> nn.Module:
    """Build a ViT-S/8 of six blocks for images of 64 pixels."""
    return models.VisionTransformer(64, 8, 6, 6, 384, 1536, num_classes=10)


def language_models() -> Iterator[Network]:
    """Yield those of transformers: of some 10 million weights, with a tied head."""
    import transformers as hf

    gpt2 = hf.GPT2Config(vocab_size=8192, n_positions=128, n_embd=256, n_head=8)
    gpt2.n_layer = 6
    llama = hf.LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    for name, kind, config in (
        ("GPT-2-like", hf.GPT2LMHeadModel, gpt2),
        ("Llama-like", hf.LlamaForCausalLM, llama),
    ):
        build = lambda kind=kind, config=config: Logits(kind(config))  # noqa: E731
        yield Network(name, build, tokens(128, 8192), 8, 0)


def networks(small: bool) -> Iterator[Network]:
    """Yield all networks."""
    size, batch = (32, 2) if small else (64, 32)
    names = ["resnet50", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x1_0"]
    names += ["regnet_y_400mf", "squeezenet1_1"]
    convolutional = [torchvision(name, size, batch) for name in names]
    plainly = {"aux_logits": False, "init_weights": False}
    convolutional += [torchvision("googlenet", size, batch, **plainly)]
    for network in convolutional:
        yield network
        name = f"{network.name}, channels last"
        yield replace(network, name=name, layout=torch.channels_last)
    yield torchvision("convnext_tiny", size, batch)
    yield torchvision("swin_t", size, batch)
    yield Network("vit, 6 blocks of 384", small_vit, images(64), batch)
    lstm = "LSTM, 2 layers of 256", Recurrent, tokens(64, 1000)
    yield Network(*lstm, batch, peer=False)
    of = lambda n: torch.randn(n, 64, 128)  # noqa: E731
    for product in (by_einsum, by_tensordot, by_inner):
        name = f"{product.__name__[3:]}, 4 layers of 128"
        yield Network(name, partial(Products, product), of, batch)
    largest = partial(Products, by_maximum, 64)
    yield Network("maximum, 4 layers of 64 x 128", largest, of, batch)
    try:
        yield from language_models()
    except ImportError as error:
        print(f"without language models: {error}")


def ours(model: nn.Module, batches: Sequence[Batch], loss: Any) -> fp.GradientMoments:
    """Return the moments of all parameters."""
    named = dict(model.named_parameters())
    return fp.gradient_moments(model, batches, loss, parameters=named)


def plain(model: nn.Module, batches: Sequence[Batch], loss: Any) -> None:
    """Run a forward and backward pass over each batch."""
    for x, y in batches:
        model.zero_grad(set_to_none=True)
        loss(model(x), y).backward()


def least(model: nn.Module, batches: Sequence[Batch], loss: Any) -> None:
    """Run them with gradients of activations, and of the first parameter alone."""
    first, *others = model.parameters()
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        plain(model, batches, loss)
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def error_of(model: nn.Module, batch: Batch, loss: Any) -> float:
    """Return the largest error of a parameter's Fisher diagonal, in norm."""
    x, y = (t[:LOOKED_AT] for t in batch)
    found, exact = ours(model, [(x, y)], loss), copy.deepcopy(model).double()
    wide = x.double() if x.is_floating_point() else x
    truth = {n: torch.zeros_like(p) for n, p in exact.named_parameters()}
    for i in range(len(x)):
        two = [i, i]  # see benchmarks.peers: a lone sample's BatchNorm is wrong
        value = loss(exact(wide[two]), y[two])
        grads = torch.autograd.grad(
            value, [*exact.parameters()], materialize_grads=True
        )
        for total, grad in zip(truth.values(), grads, strict=True):
            total += grad.square() / len(x)
    largest = max(float(t.norm()) for t in truth.values())
    errors = [
        float((found.fisher[n].double() - t).norm() / t.norm())
        for n, t in truth.items()
        if float(t.norm()) > 1e-12 * largest  # the others are zero but for rounding
    ]
    verify("largest error", max(errors) < TOLERANCE, True)
    return max(errors)


def compare(network: Network, device: str, rounds: int) -> list[dict]:
    """Race a pass, and its first batch alone, with a plain one and with the peer."""
    torch.manual_seed(0)
    model = network.build().eval().to(device).to(memory_format=network.layout)
    batches = [(x.to(device), y.to(device)) for x, y in network.batches(PASS)]
    fp.measure_batchnorm(model, batches)  # else signals vanish in new networks
    loss = F.cross_entropy if network.classes else next_token
    calls: dict[str, Callable[[], Any]] = {
        OURS: partial(ours, model, batches, loss),
        FIRST: partial(ours, model, batches[:1], loss),
        PLAIN: partial(plain, model, batches, loss),
        LEAST: partial(least, model, batches, loss),
    }
    if network.peer:
        calls[PEER] = partial(materialize, model, batches[0], loss)
    error, found = error_of(model, batches[0], loss), calls[OURS]()
    times = race(calls, lambda *_: None, device=device, rounds=rounds)
    whole, first = times[OURS].median, times[FIRST].median
    batch = times[PLAIN].median / PASS
    ways = Counter(way for path in found.paths.values() for way in path)
    about = {"network": network.name, "batch": network.batch}
    row = {
        "what": OURS,
        "weights": sum(p.numel() for p in model.parameters()),
        "ways": ", ".join(f"{way} {n}" for way, n in ways.most_common()),
        "error": error,
        "over plain": whole / PASS / batch,
        "first batch": first / batch,
        "further batch": (whole - first) / (PASS - 1) / batch,
        "least": times[LEAST].median / PASS / batch,
        **memory(model, batches[0], loss, device),
    }
    rows = [about | row | times[OURS].row()]
    if network.peer:
        over = PASS * times[PEER].median / whole
        rows.append(about | {"what": PEER, "over ours": over} | times[PEER].row())
    return rows


def materialize(model: nn.Module, batch: Batch, loss: Any) -> dict[str, Tensor]:
    """Return the Fisher diagonal from all per-sample gradients, by torch.func."""
    named = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, weights, (x[None],)), y[None])

    grads = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(named, *batch)
    return {name: g.square_().mean(0) for name, g in grads.items()}


def memory(model: nn.Module, batch: Batch, loss: Any, device: str) -> dict[str, float]:
    """Return the peak memory above a plain pass, without the accumulators' own."""
    peaks = {}
    for what, call in (("plain", plain), ("ours", ours)):
        model.zero_grad(set_to_none=True)
        bound = partial(call, model, [batch], loss)
        bound()
        model.zero_grad(set_to_none=True)
        peaks[what] = min(peak_extra_bytes(bound, device) for _ in range(2)) / 1e6
    model.zero_grad(set_to_none=True)
    accumulators = 8 * sum(p.numel() for p in model.parameters()) / 1e6
    above = peaks["ours"] - peaks["plain"]
    return {"MB above plain": above, "accumulators MB": accumulators}


@program("benchmarks.zoo")
def main(argv: Sequence[str] | None = None) -> None:
    """Run all networks and write the result file."""
    parser = arguments("zoo", __doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a trial")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these networks")
    options = parser.parse_args(argv)
    device, rows = options.device, []
    warnings.simplefilter("ignore", fp.FisherpruneWarning)
    for network in networks(options.small):
        if options.only and network.name not in options.only:
            continue
        rows += compare(network, device, options.rounds)
        print({k: v for k, v in rows[-1].items() if k != "ways"}, flush=True)
    finish("zoo", rows, ceilings(device), device, options.output)


if __name__ == "__main__":
    sys.exit(main())
