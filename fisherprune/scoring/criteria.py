"""The pruning criteria: scores as pure functions of weights and statistics.

Higher scores are kept. In the formulas ``w`` is a weight, ``m`` its mean gradient,
``F`` the mean of its squared group gradients, ``H`` the Gauss-Newton diagonal, ``D``
Hutchinson's estimate of the Hessian's, ``Hm`` the Hessian-gradient product, ``R`` the
derivative of the synaptic flow, ``P`` the meta-gradient, ``K`` the derivative of the
tangent kernel's trace and ``g`` the group size; the passes that compute them are in
``fisherprune.statistics``. To add a criterion is to add a function here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.statistics.passes import passes_for


class Statistics:
    """What is known of one parameter: its weight, and what passes have found.

    Attributes:
        w: the weight.
        g: the group size.
        generator: of random numbers for this parameter alone, on the CPU.
        m: of the pass "gradient", or "moments".
        F: of the pass "moments".
        Hm: of the pass "hessian".
        H: of the pass "gauss_newton".
        R: of the pass "synaptic_flow".
        P: of the pass "meta_gradient".
        K: of the pass "ntk_sap".
        D: of the pass "hutchinson".
    """

    def __init__(
        self,
        w: Tensor,
        g: int = 1,
        generator: torch.Generator | None = None,
        **found: Tensor,
    ) -> None:
        self.w, self.g, self.generator = w, g, generator
        self.__dict__.update(found)

    def __getattr__(self, letter: str) -> Tensor:
        """Say that no pass has found this; what was found is an attribute."""
        raise AttributeError(
            f"statistics must hold {letter!r}: a criterion that reads it must say that "
            "it needs the pass which yields it"
        )


Score = Callable[[Statistics], Tensor]
"""A formula; the scores have the weight's shape."""


@dataclass(frozen=True)
class Criterion:
    """A criterion's code, its formula and the statistics it reads.

    Attributes:
        code: the name users give.
        score: the formula.
        needs: of "gradient" (m), "moments" (m, F), "hessian" (Hm), "gauss_newton" (H)
            "hutchinson" (D), "synaptic_flow" (R), "meta_gradient" (P) and "ntk_sap"
            (K); empty = no data. What needs "gradient" alone can score any parameter.
        rounds: in how many rounds it prunes, where nothing else is asked for.
        regrow: whether weights that a round removed may come back in a later one.
    """

    code: str
    score: Score
    needs: frozenset[str]
    rounds: int = 1
    regrow: bool = False

    @property
    def summary(self) -> str:
        """First line of the formula's docstring."""
        return (self.score.__doc__ or self.code).strip().splitlines()[0]


CRITERIA: dict[str, Criterion] = {}


def register_criterion(
    *needs: str, rounds: int = 1, regrow: bool = False
) -> Callable[[Score], Score]:
    """Add a criterion: the decorated formula, whose name becomes the code.

    ::

        @fisherprune.register_criterion("moments")
        def relative(s):
            "``|m| / sqrt(F)``, the signal to noise ratio of the gradient."
            return s.m.abs() / s.F.sqrt().clamp_min(1e-12)

    Args:
        needs: the statistics passes whose results the formula reads.
        rounds: in how many rounds it prunes, where nothing else is asked for.
        regrow: whether weights that a round removed may come back in a later one.
            Their ``s.w`` is what it was; in the model they are zero.

    Raises:
        FisherpruneError: where there is no such pass, or the code is taken.
    """
    passes_for(needs)

    def register(score: Score) -> Score:
        code = score.__name__
        if code in CRITERIA:
            raise FieldError(
                "register_criterion: code", "new", f"{code!r}, which is taken"
            )
        CRITERIA[code] = Criterion(code, score, frozenset(needs), rounds, regrow)
        return score

    return register


@register_criterion()
def none(s: Statistics) -> Tensor:
    """Dense baseline: nothing is pruned."""
    return torch.ones_like(s.w)


@register_criterion()
def random(s: Statistics) -> Tensor:
    """Uniform in [0, 1), seeded."""
    drawn = torch.rand(
        s.w.shape, generator=s.generator, dtype=torch.float32, device="cpu"
    )  # alike on every device
    return drawn.to(s.w.device)


@register_criterion()
def magnitude(s: Statistics) -> Tensor:
    """``|w|``. Han et al. 2015, at initialization."""
    return s.w.abs()


@register_criterion("gradient")
def grad_norm(s: Statistics) -> Tensor:
    """``|m|``, the gradient's magnitude."""
    return s.m.abs()


@register_criterion("gradient")
def snip(s: Statistics) -> Tensor:
    """``|w m|``. Lee et al. 2019, SNIP, arXiv 1810.02340."""
    return (s.w * s.m).abs()


@register_criterion("gradient", rounds=60, regrow=True)
def force(s: Statistics) -> Tensor:
    """``|w m|``, where weights may come back. De Jorge et al. 2021, arXiv 2006.09081.

    m is the gradient of the pruned network, w the weight before it was pruned. The same
    formula without the return is the paper's Iterative SNIP: ``snip`` in rounds.
    """
    return (s.w * s.m).abs()


@register_criterion("synaptic_flow", rounds=100)
def synflow(s: Statistics) -> Tensor:
    """``|w| R``, the weight's share of the synaptic flow R. Tanaka et al. 2020.

    arXiv 2006.05467; no data but the shape of a sample. Its flow never collapses a
    layer, if there are as many rounds as in the paper, 100.
    """
    return s.w.abs() * s.R


@register_criterion("hessian")
def grasp(s: Statistics) -> Tensor:
    """``w Hm``: keep what gradient flow needs. Wang et al. 2020, arXiv 2002.07376.

    Removal is the step -w, which changes half the gradient's squared norm by -w Hm:
    large scores are those of weights whose removal hurts. Two passes. The gradient is
    that of all trainable parameters and of the plain loss, as in the published FTS
    code; ``Settings(flow="weights", temperature=200)`` is the published GraSP code's.
    """
    return s.w * s.Hm


@register_criterion("hessian")
def grasp_reversed(s: Statistics) -> Tensor:
    """``-w Hm``, the other end, as in the published FTS code and its tables."""
    return -s.w * s.Hm


@register_criterion("meta_gradient")
def prospr(s: Statistics) -> Tensor:
    """``|w P|``, SNIP after a few steps. Alizadeh et al. 2022, arXiv 2202.08132.

    P is the gradient of the loss after steps of SGD with respect to the weight before
    them, so w P is that with respect to a mask of 1 on the initial weight. One pass
    over the batches of the steps (``inner_steps`` of ``Settings``) and one batch more.
    The published code runs BatchNorm on each batch's own statistics; here it has its
    running ones, so that samples do not mix. With a momentum, the published code takes
    the first step's velocity for a constant; here nothing is left out.
    """
    return (s.w * s.P).abs()


@register_criterion("ntk_sap", rounds=20)
def ntk_sap(s: Statistics) -> Tensor:
    """``|K|``: keep what shapes the tangent kernel. Wang et al. 2023, NTK-SAP.

    K is the derivative for a mask on the weight of ``E |f(x; w) - f(x; w + e d)|^2 /
    e^2``, an estimate of the trace of the neural tangent kernel. The weights w, steps d
    and inputs x are drawn, so the network's own weights and labels play no part; pruned
    weights stay pruned. The batches are read once, for their shape; each costs three
    forward passes and the backward pass of two of them, ``ntk_draws`` times. The
    published code draws weights from Kaiming's normal distribution, here each module
    does as it does. The paper prunes in 20 rounds on CIFAR-10, the number here.
    """
    return s.K.abs()


@register_criterion("gauss_newton")
def obd(s: Statistics) -> Tensor:
    """``w^2 H / 2``. LeCun et al. 1990, Optimal Brain Damage, with the exact diagonal.

    C - 1 backward passes for C classes, or as many as ``Settings.draws`` says. Of a
    ReLU network H is the Hessian's diagonal.
    """
    return s.w.square() * s.H / 2


@register_criterion("hutchinson")
def hutchinson_diag(s: Statistics) -> Tensor:
    """``D``, Hutchinson's estimate of the Hessian's diagonal. Yao et al. 2021.

    It has a sign: elements below zero, by noise or by negative curvature, are pruned
    before those that are zero. ``Settings.probes`` says how many probes.
    """
    return s.D


@register_criterion("hutchinson")
def hutchinson_pruner(s: Statistics) -> Tensor:
    """``w^2 D / 2``. LeCun et al. 1990 with an estimated diagonal.

    Negative ones are pruned first, and of these the large weights: by the expansion
    their removal lowers the loss.
    """
    return s.w.square() * s.D / 2


@register_criterion("gradient", "hutchinson")
def hutchinson_taylor(s: Statistics) -> Tensor:
    """``|w m + w^2 D / 2|``. FTS with D for F, of arXiv 2502.11450v2.

    The sign of the first term is that of the paper's code, as of ``fts``. What is
    negative counts by its size.
    """
    return (s.w * s.m + s.w.square() * s.D / 2).abs()


@register_criterion("moments")
def fisher_diag(s: Statistics) -> Tensor:
    """``F``, the empirical Fisher diagonal itself."""
    return s.F


@register_criterion("moments")
def fisher_pruner(s: Statistics) -> Tensor:
    """``w^2 F / 2``. LeCun et al. 1990 with F for H; Theis et al. 2018."""
    return s.w.square() * s.F / 2


@register_criterion("moments")
def fts(s: Statistics) -> Tensor:
    """``|w m + g w^2 F / 2|``. Fisher-Taylor Sensitivity, arXiv 2502.11450.

    The sign of the first term is the paper's code's, which its tables show; a weight's
    deletion is the step -w, whose expansion has the other sign: ``fts_deletion``.
    """
    return (s.w * s.m + s.g * s.w.square() * s.F / 2).abs()


@register_criterion("moments")
def fts_deletion(s: Statistics) -> Tensor:
    """``|-w m + g w^2 F / 2|``, FTS with the sign of the deletion's expansion."""
    return (s.g * s.w.square() * s.F / 2 - s.w * s.m).abs()


@register_criterion("moments")
def fbss(s: Statistics) -> Tensor:
    """``g F / 2 (w - m / (g F))^2``, 0 where F = 0. arXiv 2502.11450.

    Expanded as g F w^2 / 2 - w m + m^2 / (2 g F). For given labels m^2 <= F, so the
    quotient is finite; for sampled ones m is still that of the given labels.
    """
    quotient = torch.where(s.F > 0, s.m * (s.m / (2 * s.g * s.F)), 0.0)
    score = s.g * s.F * s.w.square() / 2 - s.w * s.m + quotient
    return torch.where(s.F > 0, score, 0.0)


def criteria() -> tuple[str, ...]:
    """Return the codes of all criteria."""
    return tuple(CRITERIA)


def get_criterion(code: str) -> Criterion:
    """Return the criterion of a code.

    Raises:
        FisherpruneError: where the code is unknown; the message lists the known ones.
    """
    if code not in CRITERIA:
        raise FisherpruneError(
            f"unknown criterion {code!r}; known are {', '.join(CRITERIA)}"
        )
    return CRITERIA[code]
