"""Independent truths in float64: one group of samples at a time, plain autograd."""

from __future__ import annotations

import copy
import hashlib
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from fisherprune.statistics.structure import (
    count_samples,
    map_tensors,
    repeated,
    some_samples,
)


def in_double(model):
    """Return a float64 copy of ``model`` in eval mode."""
    model = copy.deepcopy(model).double().eval()
    if hasattr(getattr(model, "config", None), "_experts_implementation"):
        model.config._experts_implementation = "eager"  # that of others is float32's
    return model


def run(model, x):
    """Return the outputs; a lone sample is run twice and counted once.

    On the CPU, PyTorch's BatchNorm in eval mode has a wrong backward pass for a batch
    of one whose gradient is expanded over positions.
    """
    return model(torch.cat([x, x]) if len(x) == 1 else x)[: len(x)]


def group_losses(model, x, y, group_size, loss_fn=F.cross_entropy):
    """Yield the mean loss of each group of consecutive samples, one at a time."""
    for start in range(0, len(x), group_size):
        chosen = slice(start, start + group_size)
        yield loss_fn(run(model, x[chosen].double()), y[chosen])


def moments(model, x, y, names, group_size=1, loss_fn=F.cross_entropy):
    """Return {name: (m, F)} by a loop over groups."""
    model = in_double(model)
    named = dict(model.named_parameters())
    weights = [named[name] for name in names]
    total = [torch.zeros_like(w) for w in weights]
    squares = [torch.zeros_like(w) for w in weights]
    count = 0
    for loss in group_losses(model, x, y, group_size, loss_fn):
        for i, g in enumerate(
            torch.autograd.grad(loss, weights, materialize_grads=True)
        ):
            total[i] += g
            squares[i] += g * g
        count += 1
    return {n: (total[i] / count, squares[i] / count) for i, n in enumerate(names)}


def moments_of_batches(model, batches, names, group_size):
    """Return {name: (m, F)} of batches whose samples have several shapes."""
    model = in_double(model)
    weights = [dict(model.named_parameters())[name] for name in names]
    rows = [
        torch.autograd.grad(
            F.cross_entropy(run(model, x[i : i + 1].double()), y[i : i + 1]),
            weights,
            allow_unused=True,
            materialize_grads=True,
        )
        for x, y in batches
        for i in range(len(x))
    ]
    found = {}
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        found[name] = grouped(torch.stack(column), group_size)
    return found


def each_loss(model, batches, losses):
    """Yield the losses of a float64 model, each of a sample by itself, as in ``run``.

    ``losses(model, batch)`` returns ``[N]`` of batches of any structure.
    """
    for batch in batches:
        for i in range(count_samples(batch)):
            one = map_tensors(in_float64, some_samples(batch, slice(i, i + 1)))
            yield losses(model, repeated(one))[0]


def moments_of_losses(model, batches, names, losses, group_sizes):
    """Return {group size: {name: (m, F)}}; see ``each_loss``."""
    model = in_double(model).requires_grad_()
    weights = [dict(model.named_parameters())[name] for name in names]
    rows = [
        torch.autograd.grad(loss, weights, materialize_grads=True)
        for loss in each_loss(model, batches, losses)
    ]
    columns = [torch.stack(column).detach() for column in zip(*rows, strict=True)]
    return {
        size: {n: grouped(c, size) for n, c in zip(names, columns, strict=True)}
        for size in group_sizes
    }


def grouped(rows, group_size):
    """Return m and F of per-sample gradients."""
    means = torch.stack([group.mean(0) for group in rows.split(group_size)])
    return means.mean(0), means.square().mean(0)


def in_float64(tensor):
    """Return floating-point numbers as float64."""
    return tensor.double() if tensor.is_floating_point() else tensor


def hessian_gradient(
    model, x, y, names, group_size=1, flow=None, loss_fn=F.cross_entropy
):
    """Return {name: H m} by double backpropagation of the whole mean loss.

    ``flow`` names the parameters of H and m: all trainable ones where it is None.
    """
    model = in_double(model)
    losses = group_losses(model, x, y, group_size, loss_fn)
    return _product(model, losses, names, flow)


def hessian_gradient_of_losses(model, batches, names, losses):
    """Return {name: H m}; see ``each_loss``."""
    model = in_double(model)
    return _product(model, each_loss(model, batches, losses), names, None)


def _product(model, losses, names, flow):
    named = dict(model.named_parameters())
    for name in names:
        named[name].requires_grad_()
    trained = [n for n, p in named.items() if p.requires_grad] if flow is None else flow
    all_weights = [named[name] for name in dict.fromkeys([*names, *trained])]
    loss = torch.stack(list(losses)).mean()
    grads = torch.autograd.grad(
        loss, all_weights, create_graph=True, materialize_grads=True
    )
    along = sum((g * g.detach()).sum() for g in grads)
    weights = [named[name] for name in names]
    products = torch.autograd.grad(along, weights, materialize_grads=True)
    return dict(zip(names, products, strict=True))


def meta_gradient(model, batches, names, lr=0.1, momentum=0.0, loss_fn=F.cross_entropy):
    """Return {name: gradient of the last batch's loss after SGD on the others}.

    For the weights before the first step, in float64, through explicit steps.
    """
    model = in_double(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad or n in names}
    start = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
    now, velocity = dict(start), dict.fromkeys(start, 0.0)
    for i, (x, y) in enumerate(batches):
        x, y = x.double().repeat(2, *[1] * (x.dim() - 1)), y.repeat(2)  # see ``run``
        loss = loss_fn(torch.func.functional_call(model, now, (x,)), y)
        if i == len(batches) - 1:
            break
        grads = torch.autograd.grad(
            loss, [*now.values()], create_graph=True, materialize_grads=True
        )
        for (name, weight), grad in zip(now.items(), grads, strict=True):
            velocity[name] = momentum * velocity[name] + grad
            now[name] = weight - lr * velocity[name]
    grads = torch.autograd.grad(loss, [start[n] for n in names], materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def hutchinson(model, x, y, names, seed, probes):
    """Return {name: mean of z * (H z)} over probes, H of the mean loss."""
    model = in_double(model)
    return _hutchinson(model, group_losses(model, x, y, 1), names, seed, probes)


def hutchinson_of_losses(model, batches, names, losses, seed, probes):
    """Return the same; see ``each_loss``."""
    model = in_double(model)
    return _hutchinson(model, each_loss(model, batches, losses), names, seed, probes)


def _hutchinson(model, losses, names, seed, probes):
    weights = [dict(model.named_parameters())[name] for name in names]
    loss = torch.stack(list(losses)).mean()
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    total = [torch.zeros_like(w) for w in weights]
    for k in range(probes):
        z = [
            2.0 * (_words(seed, f"hutchinson {k} {n}", w.shape) & 1) - 1
            for n, w in zip(names, weights, strict=True)
        ]
        along = sum((g * s).sum() for g, s in zip(grads, z, strict=True))
        products = torch.autograd.grad(along, weights, retain_graph=True)
        for into, s, product in zip(total, z, products, strict=True):
            into += s * product / probes
    return dict(zip(names, total, strict=True))


def gauss_newton_diagonal(model, x, names):
    """Return {name: diagonal} of the matrix written out, one sample at a time."""
    model = in_double(model)
    named = dict(model.named_parameters())
    weights = [named[name] for name in names]
    total = [torch.zeros_like(w) for w in weights]
    for i in range(len(x)):
        scores = run(model, x[i : i + 1].double())[0]
        rows = [
            torch.autograd.grad(s, weights, retain_graph=True, materialize_grads=True)
            for s in scores
        ]
        p = scores.detach().softmax(0)
        hessian = p.diag() - p.outer(p)
        for into, jacobian in zip(total, zip(*rows, strict=True), strict=True):
            j = torch.stack(jacobian)
            into += torch.einsum("c...,cd,d...->...", j, hessian, j)
    return {name: t / len(x) for name, t in zip(names, total, strict=True)}


def gauss_newton_of_losses(model, batches, names, losses):
    """Return {name: diagonal}, the loss's Hessian by autograd; see ``each_loss``."""
    model = in_double(model)
    weights = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for batch in batches:
        for i in range(count_samples(batch)):
            one = map_tensors(in_float64, some_samples(batch, slice(i, i + 1)))
            rows.append(_gauss_newton_of_sample(model, one, weights, losses))
    return {
        name: torch.stack(column).mean(0)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def _gauss_newton_of_sample(model, one, weights, losses):
    seen = []

    def spy(*args, **kwargs):
        seen.append(model(*args, **kwargs))
        return seen[-1]

    losses(spy, one)
    (outputs,) = seen
    hessian = torch.autograd.functional.hessian(
        lambda o: losses(lambda *_, **__: o, one)[0], outputs.detach()
    ).reshape(outputs.numel(), -1)
    rows = [
        torch.autograd.grad(o, weights, retain_graph=True, materialize_grads=True)
        for o in outputs.flatten()
    ]
    return [
        torch.einsum("c...,cd,d...->...", torch.stack(j), hessian, torch.stack(j))
        for j in zip(*rows, strict=True)
    ]


def hessian_diagonal(model, x, y, names):
    """Return {name: diagonal} of the mean loss's Hessian, one row at a time."""
    model = in_double(model)
    named = dict(model.named_parameters())
    found = {}
    for name in names:
        weight = named[name]
        (grad,) = torch.autograd.grad(
            F.cross_entropy(model(x.double()), y), weight, create_graph=True
        )
        diagonal = [
            torch.autograd.grad(g, weight, retain_graph=True)[0].view(-1)[i]
            for i, g in enumerate(grad.view(-1))
        ]
        found[name] = torch.stack(diagonal).view_as(weight)
    return found


def uniform(seed, name, shape):
    """Return the numbers in [0, 1) of a parameter's own stream: the Mersenne Twister's.

    Its lowest 24 bits each time, seeded by a hash of the stream's name.
    """
    return (_words(seed, name, shape) & 0xFFFFFF).double() / 2**24


def _words(seed, name, shape):
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    start = (int.from_bytes(digest[:8], "little") >> 1) % 2**32
    words = np.frombuffer(
        np.random.RandomState(start).bytes(4 * math.prod(shape)), "<u4"
    )
    return torch.from_numpy(words.astype(np.int64)).view(shape)


def _fbss(s):
    found = s.g / 2 * s.F * (s.w - s.m / (s.g * s.F)) ** 2
    return torch.where(s.F > 0, found, torch.zeros_like(s.w))


FORMULAS = {
    "random": lambda s: s.u,
    "magnitude": lambda s: s.w.abs(),
    "grad_norm": lambda s: s.m.abs(),
    "snip": lambda s: (s.w * s.m).abs(),
    "force": lambda s: (s.w * s.m).abs(),
    "synflow": lambda s: s.w.abs() * s.R,
    "grasp": lambda s: s.w * s.Hm,
    "grasp_reversed": lambda s: -s.w * s.Hm,
    "prospr": lambda s: (s.w * s.P).abs(),
    "ntk_sap": lambda s: s.K.abs(),
    "hutchinson_diag": lambda s: s.D,
    "hutchinson_pruner": lambda s: s.w**2 * s.D / 2,
    "hutchinson_taylor": lambda s: (s.w * s.m + s.w**2 * s.D / 2).abs(),
    "fisher_diag": lambda s: s.F,
    "obd": lambda s: s.w**2 * s.H / 2,
    "fisher_pruner": lambda s: s.w**2 * s.F / 2,
    "fts": lambda s: (s.w * s.m + s.g * s.w**2 * s.F / 2).abs(),
    "fts_deletion": lambda s: (-s.w * s.m + s.g * s.w**2 * s.F / 2).abs(),
    "fbss": _fbss,
}
"""Scores by code: of the weights w, the group size g, and what passes find (F, say).

``u`` are the numbers of ``uniform``.
"""


def score(code, w, g=1, u=None, **found):
    """Return the scores of a criterion."""
    return FORMULAS[code](SimpleNamespace(w=w, g=g, u=u, **found))


def synaptic_flow(model, shape, names):
    """Return {name: dR / d|w|} of the network of absolute values, inputs of ones."""
    model = in_double(model)
    for tensor in model.state_dict().values():
        tensor.abs_()
    weights = [dict(model.named_parameters())[name] for name in names]
    ones = torch.ones(2, *shape, dtype=torch.float64)
    slopes = torch.autograd.grad(model(ones)[0].sum(), weights, materialize_grads=True)
    return dict(zip(names, slopes, strict=True))


def keep_largest(scores, k):
    """Return {name: mask} of the k largest scores, ties by flat index."""
    flat = torch.cat([s.flatten() for s in scores.values()]).numpy()
    kth = np.partition(flat, len(flat) - k)[len(flat) - k] if k else np.inf
    mask = flat > kth
    mask[np.flatnonzero(flat == kth)[: k - mask.sum()]] = True
    parts = torch.from_numpy(mask).split([s.numel() for s in scores.values()])
    return {n: p.view(s.shape) for (n, s), p in zip(scores.items(), parts, strict=True)}


def relative_error(found, truth):
    """Return the norm-wise relative error."""
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
