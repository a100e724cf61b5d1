"""The arguments of calls, and the tensors in them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from fisherprune.shards import PLAIN

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in arguments, in order, those in lists and tuples too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            if isinstance(each, Tensor):
                yield each
            elif isinstance(each, (list, tuple, dict)):
                yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in([*value.values()])


_NUMBERS = {int, float, bool, str, type(None), torch.dtype, torch.device}


def all_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors in arguments, in order."""
    found: list[Tensor] = []
    for each in (*args, *kwargs.values()) if kwargs else args:
        kind = type(each)
        if kind in PLAIN:
            found.append(each)
        elif kind is tuple:  # of sizes, mostly
            for entry in each:
                if type(entry) is not int:
                    found += tensors_in(each)
                    break
        elif kind not in _NUMBERS:
            found += tensors_in(each)
    return found


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return arguments with other tensors in the places of theirs, in order."""
    kind = type(value)
    if kind in PLAIN:
        return next(tensors)
    if kind in _NUMBERS or kind is tuple and _NUMBERS.issuperset(map(type, value)):
        return value
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        items = [with_tensors(each, tensors) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: with_tensors(each, tensors) for key, each in value.items()}
    return value


_EMPTY = torch.empty(0, device="cpu")


def without_tensors(arguments: Arguments) -> Arguments:
    """Return arguments with an empty tensor in each place, which takes no memory."""
    return with_tensors(arguments, repeat(_EMPTY))


def are_alike(one: object, other: object) -> bool:
    """Return whether arguments are the same but for the values of their tensors."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(are_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return [*one] == [*other] and all(map(are_alike, one.values(), other.values()))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor)
    return one is other or type(one) is type(other) in _NUMBERS and one == other
