"""Exact pruning-at-initialization for PyTorch.

Fused kernels accumulate squared per-sample gradients, the empirical Fisher diagonal, at
about the price of one backward pass, and select the global top-k over all parameters.
"""

from typing import TYPE_CHECKING

from fisherprune.lazy import lazily

if TYPE_CHECKING:
    from fisherprune import baselines, losses, models, sparse
    from fisherprune.errors import (
        FisherpruneError,
        FisherpruneWarning,
        LayerCollapseWarning,
    )
    from fisherprune.masks.masks import Masks
    from fisherprune.masks.select import select_masks
    from fisherprune.parameters import prunable_parameters
    from fisherprune.persample import Rows, register_gradients, register_layer
    from fisherprune.pruning import find_masks, prune
    from fisherprune.scoring.criteria import criteria, register_criterion
    from fisherprune.scoring.score import score, score_all
    from fisherprune.statistics.batchnorm import measure_batchnorm
    from fisherprune.statistics.check import check
    from fisherprune.statistics.coverage import Coverage
    from fisherprune.statistics.estimates import Estimate
    from fisherprune.statistics.gauss_newton import (
        gauss_newton_diagonal,
        gauss_newton_estimate,
    )
    from fisherprune.statistics.gradient_moments import GradientMoments
    from fisherprune.statistics.hutchinson import hutchinson_diagonal
    from fisherprune.statistics.in_training import moments
    from fisherprune.statistics.moments import gradient_moments
    from fisherprune.statistics.settings import Settings
    from fisherprune.subnetwork.flops import Flops, flops
    from fisherprune.subnetwork.paths import effective_masks
else:  # at the first use: the doctor and --help need neither torch nor the kernels
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Coverage": "fisherprune.statistics.coverage",
            "Estimate": "fisherprune.statistics.estimates",
            "FisherpruneError": "fisherprune.errors",
            "FisherpruneWarning": "fisherprune.errors",
            "Flops": "fisherprune.subnetwork.flops",
            "GradientMoments": "fisherprune.statistics.gradient_moments",
            "LayerCollapseWarning": "fisherprune.errors",
            "Masks": "fisherprune.masks.masks",
            "Rows": "fisherprune.persample",
            "Settings": "fisherprune.statistics.settings",
            "baselines": "fisherprune.baselines",
            "check": "fisherprune.statistics.check",
            "criteria": "fisherprune.scoring.criteria",
            "effective_masks": "fisherprune.subnetwork.paths",
            "find_masks": "fisherprune.pruning",
            "flops": "fisherprune.subnetwork.flops",
            "gauss_newton_diagonal": "fisherprune.statistics.gauss_newton",
            "gauss_newton_estimate": "fisherprune.statistics.gauss_newton",
            "gradient_moments": "fisherprune.statistics.moments",
            "hutchinson_diagonal": "fisherprune.statistics.hutchinson",
            "losses": "fisherprune.losses",
            "measure_batchnorm": "fisherprune.statistics.batchnorm",
            "models": "fisherprune.models",
            "moments": "fisherprune.statistics.in_training",
            "prunable_parameters": "fisherprune.parameters",
            "prune": "fisherprune.pruning",
            "register_criterion": "fisherprune.scoring.criteria",
            "register_gradients": "fisherprune.persample",
            "register_layer": "fisherprune.persample",
            "score": "fisherprune.scoring.score",
            "score_all": "fisherprune.scoring.score",
            "select_masks": "fisherprune.masks.select",
            "sparse": "fisherprune.sparse",
        },
    )

__version__ = "0.1.0"

__all__ = [
    "Coverage",
    "Estimate",
    "FisherpruneError",
    "FisherpruneWarning",
    "Flops",
    "GradientMoments",
    "LayerCollapseWarning",
    "Masks",
    "Rows",
    "Settings",
    "baselines",
    "check",
    "criteria",
    "effective_masks",
    "find_masks",
    "flops",
    "gauss_newton_diagonal",
    "gauss_newton_estimate",
    "gradient_moments",
    "hutchinson_diagonal",
    "losses",
    "measure_batchnorm",
    "models",
    "moments",
    "prunable_parameters",
    "prune",
    "register_criterion",
    "register_gradients",
    "register_layer",
    "score",
    "score_all",
    "select_masks",
    "sparse",
]
