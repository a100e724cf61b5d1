"""Batches of any structure: dictionaries, tuples, lists and dataclasses of tensors.

What is no such container and no tensor (None, numbers, strings, arrays) is kept as it
is. Containers keep their types: OrderedDict, a tokenizer's BatchEncoding, named tuples.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fisherprune.errors import FisherpruneError

T = TypeVar("T")


def map_tensors(function: Callable[[Tensor], Tensor], batch: T) -> T:
    """Return the same structure with ``function`` of each of its tensors.

    A container without tensors is handed on, others are made anew: dataclasses by
    ``dataclasses.replace``, so fields that are no arguments are computed again.

    Raises:
        FisherpruneError: where it holds a PackedSequence, whose samples lie apart.
    """
    if isinstance(batch, Tensor):
        return function(batch)  # type: ignore[return-value]
    items = _items(batch)
    mapped = {name: map_tensors(function, item) for name, item in items.items()}
    same = all(mapped[name] is item for name, item in items.items())
    return batch if same else _rebuilt(batch, mapped)


def named_tensors(batch: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with their places, ``"0.input_ids"``, in order."""
    for place, value in named_values(batch, name):
        if isinstance(value, Tensor):
            yield place, value


def named_values(batch: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield all that is no container, or an empty one, with its place, in order."""
    items = _items(batch)
    if not items:
        yield name, batch
    for key, item in items.items():
        yield from named_values(item, f"{name}.{key}" if name else f"{key}")


def tensors_in(batch: object) -> list[Tensor]:
    """Return the tensors in order."""
    return [tensor for _, tensor in named_tensors(batch)]


def count_samples(batch: object) -> int:
    """Return N, the leading dimension that most of the tensors have.

    Of several that equally many have, it is the first tensor's. Tensors without
    dimensions have no part in it.

    Raises:
        FisherpruneError: where there is no tensor, or N is 0.
    """
    lengths = Counter(t.shape[0] for t in tensors_in(batch) if t.dim())
    samples = lengths.most_common(1)[0][0] if lengths else 0
    if not samples:
        raise FisherpruneError(
            "a batch must hold tensors with at least one sample, samples first, got "
            f"{described(batch)}"
        )
    return samples


def some_samples(batch: T, chosen: slice) -> T:
    """Return the same structure with some of the samples.

    Tensors whose leading dimension is N are cut, views of what they were; others are
    kept, whatever they mean: a tensor that has this length by chance is cut, too.
    """
    samples = count_samples(batch)
    return map_tensors(
        lambda t: t[chosen] if t.dim() and len(t) == samples else t, batch
    )


def repeated(batch: T, times: int = 2) -> T:
    """Return the same structure with each sample several times, row after row.

    Of a lone sample autograd needs it where no tap helps: on the CPU, PyTorch's
    BatchNorm in eval mode has a wrong backward pass for a batch of one whose gradient
    is expanded over positions.
    """
    samples = count_samples(batch)
    return map_tensors(
        lambda t: torch.cat([t] * times) if t.dim() and len(t) == samples else t, batch
    )


def moved(batch: T, device: torch.device) -> T:
    """Return the same structure on ``device``, all tensors copies outside of any graph.

    Copies, for the model may change them in place; and ones that autograd may save,
    which tensors of the inference mode are not.
    """
    return map_tensors(lambda tensor: _own(tensor, device), batch)


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    here = tensor.detach()
    there = here.to(device, non_blocking=True)
    own = there.clone() if there is here else there
    return own.requires_grad_() if tensor.requires_grad else own


def described(value: object) -> str:
    """Say what came: ``tuple of (Tensor [8, 3], int)``."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} {list(value.shape)}"
    if isinstance(value, PackedSequence):
        return kind
    items = _items(value)
    if not items and not isinstance(value, (tuple, list, Mapping)):
        return kind
    shown = [
        described(item) if isinstance(name, int) else f"{name}: {described(item)}"
        for name, item in [*items.items()][:4]
    ]
    return f"{kind} of ({', '.join(shown + ['...'] * (len(items) > 4))})"


def _items(batch: object) -> dict[Any, Any]:
    """Return what the container holds, by key, name or place; else nothing."""
    if isinstance(batch, PackedSequence):
        raise FisherpruneError(
            "a batch must keep the samples apart, got a PackedSequence: give padded "
            "tensors and the lengths, and pack them in the model"
        )
    if isinstance(batch, Mapping):
        return dict(batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        return batch._asdict()
    if isinstance(batch, (tuple, list)):
        return dict(enumerate(batch))
    if is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in fields(batch) if f.init}
    return {}


def _rebuilt(batch: Any, items: dict[Any, Any]) -> Any:
    """Return a container like ``batch`` with other items."""
    if isinstance(batch, MutableMapping):
        other = copy.copy(batch)
        for name, item in items.items():
            other[name] = item
        return other
    if isinstance(batch, Mapping):
        return type(batch)(items)  # type: ignore[call-arg]
    if isinstance(batch, (tuple, list)):
        return getattr(batch, "_make", type(batch))([*items.values()])
    return replace(batch, **items)
