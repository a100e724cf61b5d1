"""All uses of a parameter in one forward pass: gradients add up before the square."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fisherprune.persample.contributions import Contribution, Mixed
from fisherprune.persample.factors import Factors, JoinedFactors
from fisherprune.persample.lookups import Lookups, TiedHead
from fisherprune.persample.ragged import RaggedFactors

if TYPE_CHECKING:
    from typing import TypeGuard


def joined(uses: Sequence[Contribution]) -> Contribution:
    """Join the uses of one parameter, those of one kind without multiplying out."""
    if len(uses) == 1:
        return uses[0]
    kinds: dict[type, list[Any]] = defaultdict(list)
    if any(isinstance(use, RaggedFactors) for use in uses):
        uses = [RaggedFactors.of_whole(use) if _is_linear(use) else use for use in uses]
    for use in uses:
        kinds[JoinedFactors if isinstance(use, Factors) else type(use)].append(use)
    parts: list[Contribution] = []
    for first, *others in kinds.values():
        if others and hasattr(first, "join"):
            parts.append(first.join(others))
        else:
            parts += [first, *others]
    match sorted(parts, key=lambda part: isinstance(part, Lookups)):
        case [only]:
            return only
        case [Factors(conv=None) as head, Lookups() as embedding]:
            return TiedHead(embedding, head)
    return Mixed(tuple(parts))


def _is_linear(use: Contribution) -> TypeGuard[Factors]:
    return isinstance(use, Factors) and use.conv is None
