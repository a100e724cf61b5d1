"""Other ways to the same numbers: mean and mean square of per-sample gradients.

Every peer is ``(model, x, y) -> {name: (m, F)}`` over the prunable parameters, with the
model in eval mode; a way that yields no F leaves it out. BackPACK and Opacus are
optional (``pip install .[bench]``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherprune as fp

Moments = dict[str, tuple[Tensor, ...]]
Batches = Sequence[tuple[Tensor, Tensor]]


def fisherprune(model: nn.Module, x: Tensor, y: Tensor) -> Moments:
    """Ours: one batched pass, no per-sample gradient in memory."""
    return fisherprune_pass(model, [(x, y)])


def fisherprune_pass(
    model: nn.Module, batches: Batches, cuda_graph: bool = False
) -> Moments:
    """Ours over several batches."""
    found = fp.gradient_moments(model, batches, cuda_graph=cuda_graph)
    return {name: (found.mean[name], found.fisher[name]) for name in found.mean}


class InTraining:
    """Ours beside ordinary passes, which fill each ``.grad`` as ever."""

    def __init__(self, model: nn.Module):
        self.model, self.moments = model, fp.moments(model)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Moments:
        """Run on one batch."""
        return self.over([(x, y)])

    def over(self, batches: Batches) -> Moments:
        """Run over several batches, whose moments add up."""
        self.model.zero_grad(set_to_none=True)
        with self.moments:
            for x, y in batches:
                F.cross_entropy(self.model(x), y).backward()
        found = self.moments.result()
        return {name: (found.mean[name], found.fisher[name]) for name in found.mean}


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Moments:
    """Run an ordinary forward and backward pass: the mean gradient alone."""
    return plain_pass(model, [(x, y)])


def plain_pass(model: nn.Module, batches: Batches) -> Moments:
    """Run ordinary forward and backward passes over several batches of equal size."""
    model.zero_grad(set_to_none=True)
    for x, y in batches:
        (F.cross_entropy(model(x), y) / len(batches)).backward()
    named = fp.prunable_parameters(model)
    return {name: (gradient(p),) for name, p in named.items()}


def gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient that a backward pass has left."""
    assert parameter.grad is not None
    return parameter.grad


def one_image_loop(model: nn.Module, x: Tensor, y: Tensor) -> Moments:
    """Run one pass per image and add up, as the published FTS code does."""
    named = fp.prunable_parameters(model)
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    squares = {name: torch.zeros_like(p) for name, p in named.items()}
    for i in range(len(x)):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for name, p in named.items():
            sums[name] += gradient(p)
            squares[name] += gradient(p) ** 2
    return {name: (sums[name] / len(x), squares[name] / len(x)) for name in named}


def materialize(model: nn.Module, x: Tensor, y: Tensor) -> Moments:
    """torch.func: vmap(grad), all per-sample gradients of the batch, then reduce."""
    named = {name: p.detach() for name, p in fp.prunable_parameters(model).items()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, weights, (image[None],))
        return F.cross_entropy(output, label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    grads = per_sample(named, x, y)
    return {name: (g.mean(0), g.square_().mean(0)) for name, g in grads.items()}


class Backpack:
    """BackPACK's SumGradSquared extension."""

    def __init__(self, model: nn.Module):
        import backpack

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = backpack.extend(copy.deepcopy(model))
        self.loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
        self.pass_through = backpack.backpack
        self.extension = backpack.extensions.SumGradSquared

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Moments:
        """Run on the extended copy of the model."""
        return self.over([(x, y)])

    def over(self, batches: Batches) -> Moments:
        """Run over several batches and add up."""
        named = fp.prunable_parameters(self.model)
        self.model.zero_grad(set_to_none=True)
        squares: dict[str, Tensor] = {}
        for x, y in batches:
            with self.pass_through(self.extension()):
                self.loss(self.model(x), y).backward()
            for name, p in named.items():
                found = p.sum_grad_squared  # type: ignore[attr-defined]
                squares[name] = squares[name] + found if name in squares else found
        n = sum(len(x) for x, _ in batches)
        means = {name: gradient(p) / n for name, p in named.items()}
        return {name: (mean, squares[name] / n) for name, mean in means.items()}


class Opacus:
    """Opacus: per-sample gradients in ``grad_sample``, then reduce."""

    def __init__(self, model: nn.Module):
        from opacus.grad_sample import GradSampleModule

        inner = copy.deepcopy(model)
        for module in inner.modules():  # Opacus trains no BatchNorm; here it is fixed
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
        self.model = GradSampleModule(inner, strict=False, loss_reduction="sum")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Moments:
        """Run on the wrapped copy of the model."""
        self.model.zero_grad(set_to_none=True)
        self.model.train()  # its hooks record in train mode only
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        F.cross_entropy(self.model(x), y, reduction="sum").backward()
        found: Moments = {}
        for name, p in fp.prunable_parameters(self.model._module).items():
            grads = p.grad_sample  # type: ignore[attr-defined]
            found[name] = grads.mean(0), grads.square().mean(0)
        return found
