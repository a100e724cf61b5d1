"""What makes the mask of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fisherprune.errors import FieldError
from fisherprune.masks.counts import checked_sparsity
from fisherprune.masks.plan import check_pattern
from fisherprune.masks.scopes.registry import SCOPES
from fisherprune.masks.structures.registry import FORMS
from fisherprune.masks.ties import TIES
from fisherprune.rounds import SCHEDULES
from fisherprune.runs.kinds import at_least, must, one_of
from fisherprune.runs.option import Effect, names, option
from fisherprune.runs.parts.seeded import Seeded
from fisherprune.scoring.criteria import CRITERIA
from fisherprune.statistics.settings import FLOWS, LABELS, UNSEEN, Settings

SCORED, SCORED_ON_CUDA = 256, 1024
"""Images scored at a time where nothing else is said; the second of SMALL ones."""
SMALL = 32
"""Pixels of a side."""


def _own_rounds() -> str:
    several = [c for c in CRITERIA.values() if c.rounds > 1]
    return ", ".join(f"{c.code} {c.rounds}" for c in several)


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Seeded):
    """What makes the mask; a run that prunes nothing ignores it but for ``skip``."""

    method: str = option(
        "fts",
        f"criterion: {', '.join(CRITERIA)}; none trains densely",
        one_of(CRITERIA),
        metavar="CODE",
    )
    sparsity: float = option(
        0.9,
        "fraction of the prunable weights removed, from 0 to 1 (default: 0.9, or 0 for "
        "method none)",
    )
    scope: str = option(
        "global",
        "where scores compete: "
        + ", ".join(f"{name} ({one.help})" for name, one in SCOPES.items()),
        one_of(SCOPES),
    )
    densities: Mapping[str, float] | None = option(
        None,
        "relative density of each parameter for scope densities: a JSON file "
        '{"PARAMETER": NUMBER, ...} or the masks.safetensors of another run',
        metavar="FILE",
        hash=False,
    )
    min_per_layer: int = option(
        0, "weights that each layer keeps at least", at_least(0)
    )
    structure: str = option(
        "weights",
        "what is kept or pruned together: "
        + ", ".join(f"{form.text} ({form.help})" for form in FORMS),
    )
    rounds: int | None = option(
        None,
        "in how many rounds weights are scored and removed (default: the method's own "
        f"number: {_own_rounds()}, others 1)",
        at_least(1),
    )
    schedule: str = option(
        SCHEDULES[0],
        "how the share of the weights that is kept falls over the rounds: "
        f"{' or '.join(SCHEDULES)}",
        one_of(SCHEDULES),
    )
    skip: tuple[str, ...] | None = option(
        None,
        "prune all parameters but those with one of these parts in their name; "
        "'bias linear bn' is the choice of the published FTS code (default: the "
        "weights of Conv and Linear layers but the classifier)",
    )
    ties: str = option(
        "error",
        "what if equal scores decide which weights are kept: error ends the run, "
        "position keeps the first ones",
        one_of(TIES),
    )
    invert_scores: bool = option(False, "sanity check: keep the smallest scores")
    shuffle_masks: bool = option(
        False, "sanity check: permute each mask within its layer"
    )
    reinitialize: bool = option(
        False, "sanity check: draw new initial weights under the mask"
    )
    group_size: int = option(
        1,
        "samples whose mean gradient is squared as one; 1 is the exact empirical "
        "Fisher",
        at_least(1),
    )
    flow: str = option(
        Settings.flow,
        "of grasp, the parameters of whose gradient the flow is, beside those scored: "
        "trainable (all), weights (of Conv and Linear layers, as in the GraSP code) or "
        "scored (none)",
        one_of(FLOWS),
    )
    temperature: float = option(
        Settings.temperature,
        "of grasp, what the outputs are divided by; 200 in the paper's code",
        must(lambda value: 0 < value < math.inf, "a number above 0"),
    )
    inner_steps: int = option(
        Settings.inner_steps,
        "of prospr, the steps of SGD through which it differentiates; each takes a "
        "batch of --score-batch-size images, the loss after them one more",
        at_least(1),
    )
    inner_lr: float = option(
        Settings.inner_lr,
        "of prospr, the learning rate of these steps",
        must(lambda value: 0 < value < math.inf, "a number above 0"),
    )
    inner_momentum: float = option(
        Settings.inner_momentum,
        "of prospr, the momentum of these steps",
        must(lambda value: 0 <= value < 1, "in [0, 1)"),
    )
    ntk_draws: int = option(
        Settings.ntk_draws,
        "of ntk_sap, initializations for each batch",
        at_least(1),
    )
    ntk_epsilon: float = option(
        Settings.ntk_epsilon,
        "of ntk_sap, the size of the perturbations of weights",
        must(lambda value: 0 < value < math.inf, "a number above 0"),
    )
    labels: str = option(
        Settings.labels,
        "of squared gradients: given (by the data) or sampled (from the model); the "
        "mean gradient is always that of given labels",
        one_of(LABELS),
    )
    draws: int | None = option(
        Settings.draws,
        "random draws a sample: of sampled labels (default: 1), and of the curvature "
        "of obd (default: exact, a pass for each class)",
        at_least(1),
    )
    probes: int = option(
        Settings.probes,
        "random probes of the Hessian's diagonal, for methods hutchinson_*",
        at_least(1),
    )
    bn_warmup: bool = option(
        False,
        "before the scoring, set the BatchNorm statistics to those of the training "
        "images; the weights stay",
    )
    score_samples: int | None = option(
        None,
        "score on a stratified subset of this many training images (default: all)",
        at_least(1),
    )
    score_batch_size: int | None = option(
        None,
        f"images scored at a time (default: {SCORED}; on CUDA {SCORED_ON_CUDA} where "
        f"images have at most {SMALL} x {SMALL} pixels and the method needs no second "
        "derivatives); more take more memory, the scores are the same but for prospr's "
        "and ntk_sap's, which take each batch for a step or a draw",
        at_least(1),
        effect=Effect.ROUNDING,
    )

    @property
    def settings(self) -> Settings:
        """Return what the fields of the same names tell the passes."""
        told = (name for name in names(Settings) if name not in UNSEEN)
        return Settings(**{name: getattr(self, name) for name in told})

    def check_mask(self) -> None:
        """Check the fields that depend on each other."""
        _ = self.settings
        checked_sparsity(self.sparsity)
        check_pattern(
            self.scope,
            densities=self.densities,
            min_per_layer=self.min_per_layer,
            structure=self.structure,
            sparsity=None if self.method == "none" else self.sparsity,
        )
        if self.shuffle_masks and self.structure != "weights":
            wanted = f"False for structure {self.structure}, which it would break"
            raise FieldError("shuffle_masks", wanted, True)
        if self.method != "none":
            return
        if self.sparsity != 0:
            wanted = "0 for method none, which prunes nothing"
            raise FieldError("sparsity", wanted, self.sparsity)
        for name in (
            *("scope", "min_per_layer", "structure", "rounds", "schedule"),
            *("invert_scores", "shuffle_masks", "reinitialize"),
        ):
            value, idle = getattr(self, name), getattr(MaskConfig, name)
            if value != idle:
                raise FieldError(name, f"{idle} for method none", value)
