"""What statistics passes can be told, beside the model and the data."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from fisherprune.errors import FieldError, shown

FLOWS = ("trainable", "weights", "scored")
LABELS = ("given", "sampled")
CPU = "cpu"
"""What ``offload`` calls the CPU's memory."""
PLACES = ("max_accumulator_bytes", "offload")
"""Fields that say where sums are kept."""
UNSEEN = (*PLACES, "cuda_graph")
"""Fields that change no result: no run has an option for them, no key depends on them.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What passes over the data can be told; each pass reads its own.

    Attributes:
        flow: of grasp, the parameters of whose gradient the flow is: "trainable", all
            that have ``requires_grad``, as in the published FTS code; "weights", those
            of Conv and Linear layers, the classifier's too, as in the published GraSP
            code; "scored", none but those scored. These are always among them.
        temperature: of grasp, what the outputs are divided by before the loss: 200 in
            the paper's code and in Synaptic-Flow's, 1 in the published FTS code.
        inner_steps: of prospr, the steps of SGD through which it differentiates.
        inner_lr: of prospr, their learning rate.
        inner_momentum: of prospr, their momentum. All three are by default what the
            published ProsPr code's command has.
        ntk_draws: of ntk_sap, initializations for each batch; R in the paper.
        ntk_epsilon: of ntk_sap, the size of the perturbations.
        labels: of the squared gradients F: "given" by the data, or "sampled" from the
            model, see ``gradient_moments``. The mean gradient m is that of given ones.
        draws: of sampled labels, one where it is None; and of the Gauss-Newton
            diagonal H, which is exact where it is None, see ``gauss_newton_estimate``.
        probes: of the Hessian's diagonal D, see ``hutchinson_diagonal``.
        max_accumulator_bytes: of memory that the sums of a pass take, 24 bytes a weight
            and more for groups: the parameters are shared out over as many passes over
            the batches as that needs, see ``gradient_moments``. None: one pass.
        offload: where sums and scores are kept: beside the parameters where it is None,
            "cpu" in the CPU's memory, or in memory-mapped files in a folder. Of passes
            for "moments", "gradient" and "gauss_newton", as ``max_accumulator_bytes``:
            the others refuse both. Results are the same, bit for bit.
        cuda_graph: of the pass for "moments", whether batches of the same shapes run as
            one CUDA graph where they can, see ``gradient_moments``; other passes run as
            ever. Not for sampled labels.

    Raises:
        FisherpruneError: where a value is not what its field takes.
    """

    flow: str = "trainable"
    temperature: float = 1.0
    inner_steps: int = 3
    inner_lr: float = 0.1
    inner_momentum: float = 0.0
    ntk_draws: int = 1
    ntk_epsilon: float = 0.01
    labels: str = "given"
    draws: int | None = None
    probes: int = 10
    max_accumulator_bytes: int | None = None
    offload: str | os.PathLike[str] | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        """Check every field by itself."""
        if self.flow not in FLOWS:
            raise FieldError("flow", f"one of {', '.join(FLOWS)}", shown(self.flow))
        _check_number("temperature", self.temperature, above=0)
        checked_number("inner_steps", self.inner_steps)
        _check_number("inner_lr", self.inner_lr, above=0)
        if self.inner_momentum != 0:
            _check_number("inner_momentum", self.inner_momentum, above=0, below=1)
        checked_number("ntk_draws", self.ntk_draws)
        _check_number("ntk_epsilon", self.ntk_epsilon, above=0)
        if self.labels not in LABELS:
            raise FieldError("labels", "'given' or 'sampled'", shown(self.labels))
        if self.draws is not None:
            checked_number("draws", self.draws)
        checked_number("probes", self.probes)
        if self.max_accumulator_bytes is not None:
            checked_number("max_accumulator_bytes", self.max_accumulator_bytes)
        _check_offload(self.offload)
        if not isinstance(self.cuda_graph, bool):
            raise FieldError("cuda_graph", "True or False", shown(self.cuda_graph))
        if self.cuda_graph and self.labels == "sampled":
            raise FieldError("cuda_graph", "False where labels are sampled", True)


def _check_offload(value: object) -> None:
    if value is None or value == CPU:
        return
    if not isinstance(value, str | os.PathLike) or not os.path.isdir(value):
        wanted = "None, 'cpu' or a folder that is there"
        raise FieldError("offload", wanted, shown(value))


def _check_number(
    name: str, value: object, *, above: float, below: float = math.inf
) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not above < value < below:  # type: ignore[operator]
        wanted = f"a number above {above}"
        wanted += f" and below {below}" if below < math.inf else ""
        raise FieldError(name, wanted, shown(value))


def checked_number(name: str, value: object, least: int = 1) -> int:
    """Return a whole number that is large enough.

    Raises:
        FisherpruneError: where it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FieldError(name, f"an integer of at least {least}", shown(value))
    return value


def checked_settings(settings: Settings | None) -> Settings:
    """Return ``settings``, or all defaults.

    Raises:
        FisherpruneError: where it is something else.
    """
    if settings is None:
        return Settings()
    if not isinstance(settings, Settings):
        wanted = "fisherprune.Settings(...)"
        raise FieldError("settings", wanted, shown(settings))
    return settings
