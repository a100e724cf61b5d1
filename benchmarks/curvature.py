"""The exact Gauss-Newton diagonal against other exact ways and random probes.

``python -m benchmarks.curvature`` takes VGG11 as a plain sequence of layers, which
BackPACK's second-order extensions need. Its Hessian has the same diagonal, since it is
piecewise linear: so Hutchinson's estimate by Hessian-vector products is of the same
numbers. Times are milliseconds per image; errors are relative, in the 2-norm over all
weights, against a float64 loop over images and classes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherprune as fp
from benchmarks.end_to_end import TOLERANCE, images
from benchmarks.harness import WrongResult, ceilings, race
from benchmarks.record import arguments, finish, program
from fisherprune.models import vgg

PROBES = (1, 10)  # of Hutchinson's estimate


def network(device: str) -> nn.Sequential:
    """Return VGG11 without a module of its own around the layers."""
    net = vgg.vgg11(num_classes=10)
    return nn.Sequential(*net.features, nn.Flatten(), net.linear).eval().to(device)


def ours(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """All backward passes through one forward pass, squares summed up on the way."""
    found = fp.gauss_newton_diagonal(model, [(x, y)], parameters=named(model))
    return list(found.values())


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights whose diagonal is asked for: those with several dimensions."""
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def materialized(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """torch.func: the Jacobian of every image's scores in memory, then reduce."""
    weights = {name: p.detach() for name, p in named(model).items()}

    def scores(weights: dict[str, Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.func.functional_call(model, weights, (image[None],))[0]
        return out, out

    jacobian = torch.func.jacrev(scores, has_aux=True)
    rows, out = torch.func.vmap(jacobian, in_dims=(None, 0))(weights, x)
    p, found = out.softmax(1), []
    for j in rows.values():
        squares = torch.einsum("nc...,nc->...", j.square(), p)
        centre = torch.einsum("nc...,nc->n...", j, p)
        found.append((squares - centre.square().sum(0)) / len(x))
    return found


class Backpack:
    """BackPACK's DiagGGNExact."""

    def __init__(self, model: nn.Module):
        import backpack
        from backpack.extensions import DiagGGNExact

        self.model = backpack.extend(copy.deepcopy(model))
        self.loss = backpack.extend(nn.CrossEntropyLoss())
        self.pass_through, self.extension = backpack.backpack, DiagGGNExact

    def __call__(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Run on the extended copy of the model."""
        self.model.zero_grad(set_to_none=True)
        with self.pass_through(self.extension()):
            self.loss(self.model(x), y).backward()
        return [
            p.diag_ggn_exact  # type: ignore[attr-defined]
            for p in named(self.model).values()
        ]


def hutchinson(probes: int, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Estimate the Hessian's diagonal: mean of v * Hv over random signs v."""
    weights = list(named(model).values())
    grads = torch.autograd.grad(
        F.cross_entropy(model(x), y), weights, create_graph=True
    )
    totals = [torch.zeros_like(w) for w in weights]
    for _ in range(probes):
        signs = [torch.randint_like(w, 2) * 2 - 1 for w in weights]
        products = torch.autograd.grad(grads, weights, signs, retain_graph=True)
        for total, v, hv in zip(totals, signs, products, strict=True):
            total += v * hv / probes
    return totals


def truth(model: nn.Module, x: Tensor) -> list[Tensor]:
    """One image and class at a time, in float64."""
    model = copy.deepcopy(model).double()
    weights = list(named(model).values())
    totals = [torch.zeros_like(w) for w in weights]
    for image in x.double():
        scores = model(image[None])[0]
        p = scores.detach().softmax(0)
        centre = [torch.zeros_like(w) for w in weights]
        for c in range(len(p)):
            rows = torch.autograd.grad(scores[c], weights, retain_graph=True)
            for total, mean, row in zip(totals, centre, rows, strict=True):
                total += p[c] * row.square()
                mean += p[c] * row
        for total, mean in zip(totals, centre, strict=True):
            total -= mean.square()
    return [total / len(x) for total in totals]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the error's 2-norm over that of the truth, over all weights."""
    truth = torch.cat([e.flatten() for e in expected])
    error = torch.cat([f.flatten() for f in found]).double() - truth
    return (error.norm() / truth.norm()).item()


def competitors(
    model: nn.Module, x: Tensor, y: Tensor
) -> dict[str, Callable[[], list[Tensor]]]:
    """Bind all ways to a batch; BackPACK is left out, aloud, where it is missing."""
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    calls["fisherprune"] = partial(ours, model, x, y)
    try:
        calls["BackPACK DiagGGNExact"] = partial(Backpack(model), x, y)
    except ImportError as error:
        print(f"without BackPACK: {error}")
    calls["vmap(jacrev)"] = partial(materialized, model, x, y)
    for n in PROBES:
        name = f"Hutchinson, {n} probe{'s' * (n > 1)}"
        calls[name] = partial(hutchinson, n, model, x, y)
    return calls


def compare(batch: int, device: str, rounds: int) -> list[dict]:
    """Race all ways over one batch; the exact ones must be right."""
    model, (x, y) = network(device), images(batch, 32, device)
    expected, errors = truth(model, x), {}

    def check(what: str, found: list[Tensor]) -> None:
        errors[what] = relative_error(found, expected)
        exact = not what.startswith("Hutchinson")
        if exact and not errors[what] <= TOLERANCE:
            raise WrongResult(f"{what}: relative error {errors[what]:.2e}")

    times = race(competitors(model, x, y), check, device=device, rounds=rounds)
    mine, rows = times["fisherprune"].median, []
    for what, time in times.items():
        row = {"network": "vgg11", "batch": batch, "what": what}
        row |= {q: ms / batch for q, ms in time.row().items()}
        row |= {"rounds": rounds, "to ours": time.median / mine, "error": errors[what]}
        rows.append(row)
    return rows


@program("benchmarks.curvature")
def main(argv: Sequence[str] | None = None) -> None:
    """Compare, and write the result file."""
    parser = arguments("curvature", __doc__)
    parser.add_argument("--small", action="store_true", help="two images, for a trial")
    options = parser.parse_args(argv)
    device = options.device
    rows = compare(2 if options.small else 8, device, options.rounds)
    finish("curvature", rows, ceilings(device), device, options.output)


if __name__ == "__main__":
    sys.exit(main())
