"""Exact pruning-at-initialization for PyTorch.

Fused kernels accumulate squared per-sample gradients, the empirical Fisher diagonal, at
about the price of one backward pass, and select the global top-k over all parameters.
"""

from pkgutil import extend_path

from fisherprune.startup import silence_interrupts

# Run from a source folder, the package still finds the kernels of the installed one.
__path__ = extend_path(__path__, __name__)

silence_interrupts()
try:
    from fisherprune import baselines, models
    from fisherprune.errors import FisherpruneError
    from fisherprune.masks.masks import Masks
    from fisherprune.masks.select import select_masks
    from fisherprune.parameters import prunable_parameters
    from fisherprune.prune import prune
    from fisherprune.scoring.criteria import criteria
    from fisherprune.scoring.score import score, score_all
    from fisherprune.statistics.gauss_newton import gauss_newton_diagonal
    from fisherprune.statistics.moments import GradientMoments, gradient_moments
except ImportError as error:  # kept for the first use, so that the doctor can run
    _import_error = error

    def __getattr__(name):
        if name in __all__:
            raise _import_error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "FisherpruneError",
    "GradientMoments",
    "Masks",
    "baselines",
    "criteria",
    "gauss_newton_diagonal",
    "gradient_moments",
    "models",
    "prunable_parameters",
    "prune",
    "score",
    "score_all",
    "select_masks",
]
