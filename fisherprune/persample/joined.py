"""All uses of a parameter in one forward pass: gradients add up before the square."""

from __future__ import annotations

from collections.abc import Sequence

from fisherprune.persample.contributions import Contribution, Mixed, Rows
from fisherprune.persample.factors import Factors, JoinedFactors
from fisherprune.persample.lookups import Lookups, TiedHead


def joined(uses: Sequence[Contribution]) -> Contribution:
    """Join the uses of one parameter, those of one kind without multiplying out."""
    if len(uses) == 1:
        return uses[0]
    rows = [use for use in uses if isinstance(use, Rows)]
    factors = [use for use in uses if isinstance(use, Factors | JoinedFactors)]
    lookups = [use for use in uses if isinstance(use, Lookups)]
    kinds = (Rows, Factors, JoinedFactors, Lookups)
    parts = [use for use in uses if not isinstance(use, kinds)]
    if rows:
        parts.append(Rows(Rows.summed(use.per_sample() for use in rows)))
    parts += [
        few[0].join(few[1:]) if len(few) > 1 else few[0]
        for few in (factors, lookups)
        if few
    ]
    match parts:
        case [only]:
            return only
        case [Factors(conv=None) as head, Lookups() as embedding]:
            return TiedHead(embedding, head)
    return Mixed(tuple(parts))
