"""The check that a model reads the tensors that stand in for its parameters."""

from __future__ import annotations

from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.persample.backward import nodes_of


def check_stand_ins(op: str, result: Tensor, model: nn.Module) -> None:
    """Refuse a result of ``functional_call`` that the model's own parameters made.

    Raises:
        FisherpruneError: where it depends on one that requires a gradient.
    """
    own = {id(p): name for name, p in model.named_parameters()}
    for node in nodes_of(result):
        if name := own.get(id(getattr(node, "variable", None))):
            raise FisherpruneError(
                f"{op}: the model must read its parameter {name!r} as an attribute of "
                "its module, where another tensor stands in for it, but reads it from "
                "elsewhere too, a list say: change that, or choose another criterion"
            )
