"""Functions of which it is known that they keep samples apart.

Where the samples are the first axis of what such a function reads, each row of its
result depends on the same row alone. A model that calls nothing else mixes no samples,
and has them first in every layer: nothing must be run to see that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.functions import Function


class RowCall(NamedTuple):
    """A call that may keep rows.

    Attributes:
        args: by place.
        kwargs: by name.
        own: the tensors in them of samples, which are the first axis; at least one.
        shared: the other tensors, the same for all batches.
        sized: whether sizes were read before: then numbers may come from that of the
            batch.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    own: Sequence[Tensor]
    shared: Sequence[Tensor]
    sized: bool = True

    def option(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument that comes by its place, or by its name."""
        return (
            self.args[place]
            if place < len(self.args)
            else self.kwargs.get(name, default)
        )

    def reads(self, dims: int | None = None) -> bool:
        """Return whether the samples are in the first argument alone, ``input``.

        Args:
            dims: that it has; None: at least two.
        """
        (input, *others), dim = self.own, self.own[0].dim()
        if others or input is not self.option(0, "input"):
            return False
        return dim >= 2 if dims is None else dim == dims

    def spares_first(self, axes: Any) -> bool:
        """Return whether axes are given, and none of them is that of samples."""
        axes, dims = [axes] if isinstance(axes, int) else axes, self.own[0].dim()
        if not isinstance(axes, Sequence) or not axes:
            return False
        return all(isinstance(axis, int) and axis % dims != 0 for axis in axes)


ROWWISE: dict[Function, Callable[[RowCall], bool]] = {}
"""From a function to whether it keeps rows in a call.

Its results, which must be tensors with N rows, then have the samples first.
"""


def _register(
    names: str, places: Sequence[Any], keeps: Callable[[RowCall], bool]
) -> None:
    """Add functions by their names in each of the places."""
    for name in names.split():
        functions = (getattr(place, name, None) for place in places)
        ROWWISE.update((f, keeps) for f in functions if f is not None)


def _one(call: RowCall) -> bool:
    """Each element by itself, or all in their order: N rows stay the same rows."""
    return len(call.own) == 1 and not call.shared


def _images(axes: int) -> Callable[[RowCall], bool]:
    """Windows of some axes, behind those of samples and channels."""
    return lambda call: call.reads(axes + 2)


def _combined(call: RowCall) -> bool:
    """Elements of tensors; what is shared has no axis where others have samples."""
    dims, read = call.own[0].dim(), len(call.own) + len(call.shared)
    if not call.sized:
        read += sum(type(each) in (int, float) for each in call.args)
    if call.kwargs or len(call.args) != read:
        return False
    return all(each.dim() == dims for each in call.own) and all(
        each.dim() < dims or each.dim() == dims and each.shape[0] == 1
        for each in call.shared
    )


def _combined_in_place(call: RowCall) -> bool:
    return _combined(call) and call.args[0] is call.own[0]


def _joined(call: RowCall) -> bool:
    return not call.shared and call.spares_first(call.option(1, "dim", 0))


def _along(place: int, default: int | None) -> Callable[[RowCall], bool]:
    """Other axes than the first, of which an argument tells."""
    return lambda call: (
        _one(call) and call.spares_first(call.option(place, "dim", default))
    )


def _permuted(call: RowCall) -> bool:
    dims = call.option(1, "dims", ())
    dims = call.args[1:] if isinstance(dims, int) else dims
    return _one(call) and len(dims) > 0 and dims[0] % len(dims) == 0


def _transposed(call: RowCall) -> bool:
    axes = [call.option(1, "dim0"), call.option(2, "dim1")]
    return _one(call) and call.spares_first(axes)


def _contracted(call: RowCall) -> bool:
    """``"nti,io->nto"``: the samples' letter comes first, in one operand alone."""
    equation, *operands = call.args
    if not isinstance(equation, str) or len(call.own) != 1 or call.kwargs:
        return False
    inputs, _, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(letters) != len(operands) or "." in equation:
        return False
    pairs = zip(letters, operands, strict=True)
    first = next((n[:1] for n, x in pairs if x is call.own[0]), "")  # "": in a list
    found = inputs.count(first), output.count(first)
    return first != "" and first == output[:1] and found == (1, 1)


def _multiplied(call: RowCall) -> bool:
    """Contract the last axes of the first argument with the first of the other."""
    axes = call.option(2, "dims", 2)
    return call.reads() and isinstance(axes, int) and axes < call.own[0].dim()


def _indexed(call: RowCall) -> bool:
    """``x[:, 0]``, ``x[..., -1]``: numbers and slices behind the axis of samples."""
    x, index = call.args
    if len(call.own) > 1 or call.shared or x is not call.own[0]:
        return False
    parts = index if isinstance(index, tuple) else (index,)
    limits = [limit for part in parts for limit in _limits_of(part)]
    if not all(type(each) in (int, type(None)) for each in limits):
        return False
    if call.sized and not {0, 1, -1, None}.issuperset(limits):
        return False
    if parts and parts[0] is Ellipsis:
        return sum(part is not None for part in parts[1:]) < x.dim()
    return bool(parts) and isinstance(parts[0], slice) and parts[0] == slice(None)


def _limits_of(part: Any) -> tuple[Any, ...]:
    if part is Ellipsis:
        return ()
    is_slice = isinstance(part, slice)
    return (part.start, part.stop, part.step) if is_slice else (part,)


def _looked_up(call: RowCall) -> bool:
    """Rows of a table, which the call does not change."""
    changes = call.option(3, "max_norm"), call.option(5, "scale_grad_by_freq", False)
    return call.reads(call.own[0].dim()) and changes == (None, False)


ANY, MODULES = (torch, Tensor), (F,)
_register("contiguous relu relu_ selu sigmoid tanh", ANY, _one)
_register("flatten reshape squeeze unflatten unsqueeze view", ANY, _one)
_register("add div maximum minimum mul sub", ANY, _combined)
_register("add_ div_ mul_ sub_", ANY, _combined_in_place)
_register("cat concat", ANY, _joined)
_register("einsum", ANY, _contracted)
_register("tensordot", ANY, _multiplied)
_register("inner", ANY, RowCall.reads)
_register("permute", ANY, _permuted)
_register("transpose", ANY, _transposed)
_register("chunk split", ANY, _along(2, 0))
_register("mean softmax sum", ANY, _along(1, None))
_register("softmax", MODULES, _along(1, None))
_register(
    "elu gelu hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 "
    "selu sigmoid silu softplus tanh",
    MODULES,
    _one,
)
_register(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout",
    MODULES,
    lambda call: _one(call) and call.option(2, "training", True) is False,
)
for _axes in (1, 2, 3):
    _register(
        f"max_pool{_axes}d avg_pool{_axes}d adaptive_max_pool{_axes}d "
        f"adaptive_avg_pool{_axes}d conv{_axes}d conv_transpose{_axes}d",
        MODULES,
        _images(_axes),
    )
_register("__getitem__", (Tensor,), _indexed)
_register("embedding", MODULES, _looked_up)
_register("linear group_norm", MODULES, RowCall.reads)
_register("interpolate", MODULES, lambda call: call.reads() and call.own[0].dim() > 2)
_register(
    "batch_norm",
    MODULES,
    lambda call: call.reads() and call.option(5, "training", False) is False,
)
_register(
    "layer_norm",
    MODULES,
    lambda call: (
        call.reads() and len(call.option(1, "normalized_shape")) < call.own[0].dim()
    ),
)
