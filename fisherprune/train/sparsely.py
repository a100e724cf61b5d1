"""Training without the pruned weights; to all else the network is dense as ever."""

from __future__ import annotations

import copy
import time
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.errors import LayerCollapseWarning
from fisherprune.masks.masks import Masks
from fisherprune.ops.dense import dense_weight
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.result import Execution
from fisherprune.sparse import compress, decompress
from fisherprune.sparse.cost import expected_speedup
from fisherprune.sparse.optimizers import sparse_layers

PAYS = 1.15
"""Expected speedup from which ``auto`` trains sparsely."""
PATTERN = ("values", "rows", "columns")
STEPS, LONG = 5, 2.0
"""Most steps that are timed, and the seconds after which no other one is begun."""


def expectation(
    config: TrainConfig, model: nn.Module, masks: Masks | None, images: Tensor
) -> float | None:
    """Return how many times faster a step will be sparse, where it shall be.

    Returns:
        None where the network is to be trained densely.

    Raises:
        FisherpruneError: where sparse training is asked for and can't be.
    """
    if config.sparse == "off" or masks is None:
        return None
    on_cpu = images.device.type == "cpu"
    asked = config.sparse == "on"
    if not asked and (not on_cpu or config.compile):
        return None
    dtype = torch.bfloat16 if config.amp else torch.float32
    found = expected_speedup(model, masks, images, dtype) if on_cpu else 1.0
    return found if asked or found >= PAYS else None


class SparseTraining:
    """A network whose masked layers are sparse from now on, and its optimizer.

    Args:
        model: is changed.
        masks: of its weights, held so far.
        optimizer: trains it, and goes on.
        expected: how many times faster a step is expected to be.
        batch: to measure a step with; None measures nothing.
        amp: the autocast that steps run in.
        fuse: whether BatchNorm and ReLU become one op.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        optimizer: torch.optim.SGD,
        expected: float,
        batch: tuple[Tensor, Tensor] | None,
        amp: torch.autocast,
        fuse: bool,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        dense, before = bytes_of(model), self._remembered_bytes()
        slow = None if batch is None else step_seconds(model, *batch, amp)
        with warnings.catch_warnings(), amp:
            # The result tells of collapsed layers.
            warnings.simplefilter("ignore", LayerCollapseWarning)
            compress(model.train(), masks, optimizer=optimizer, fuse=fuse)
        fast = None if batch is None else step_seconds(model, *batch, amp)
        self.execution = Execution(
            sparse_layers=sum(1 for _ in sparse_layers(model)),
            expected=expected,
            dense_step=slow,
            sparse_step=fast,
            weights=bytes_of(model),
            dense_weights=dense,
            optimizer=self._remembered_bytes(),
            dense_optimizer=before,
        )

    def dense_state(self) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """Return the states of model and optimizer as if all layers were dense."""
        model = self.model.state_dict()
        layers = {}
        for name, layer in sparse_layers(self.model):
            layers[id(layer.values)] = layer
            for part in PATTERN:
                del model[f"{name}.{part}"]
            model[f"{name}.weight"] = layer.weight.detach()
        optimizer = dict(self.optimizer.state_dict()["state"])
        parameters = (p for g in self.optimizer.param_groups for p in g["params"])
        for index, parameter in enumerate(parameters):
            if (found := layers.get(id(parameter))) and index in optimizer:
                pattern = found.rows, found.columns, found.shape
                optimizer[index] = {
                    key: dense_weight(value, *pattern)
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value
                    for key, value in optimizer[index].items()
                }
        return model, optimizer

    def end(self) -> None:
        """Make the network dense again."""
        if self.execution["sparse_layers"]:
            decompress(self.model, optimizer=self.optimizer)

    def _remembered_bytes(self) -> int:
        """Return the bytes of a momentum for each parameter."""
        return bytes_of(self.model) if self.optimizer.defaults["momentum"] else 0


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def step_seconds(
    model: nn.Module, images: Tensor, labels: Tensor, amp: torch.autocast
) -> float | None:
    """Return how long a training step takes, on a copy; None where there is none."""
    try:
        model = copy.deepcopy(model).train()
    except Exception:  # whatever a user's model raises where it is copied
        return None
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9, fused=True)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        with amp:
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        if len(seconds) > 1 and sum(seconds) > LONG:
            break
    return min(seconds)
