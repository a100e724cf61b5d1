"""Channels of several layers that go together, and which of them can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisherprune.modules import TRANSPOSED
from fisherprune.sparse.channels import (
    by_input,
    folds,
    groups_of,
    is_reader,
    size_of,
)
from fisherprune.sparse.probing import Reads

Claims = dict[nn.Module, dict[int, set[int]]]
"""Channels of layers, each with the root channels that take it along."""


@dataclass
class Coupled:
    """Channels of layers that go together, numbered by those of one, the root.

    Attributes:
        root: a layer.
        handler: what Torch-Pruning calls to prune its outputs.
        roots: how many outputs it has.
        inputs: channels that layers read, or map each by itself.
        outputs: channels that layers make, or map each by itself.
        stay: why root channels can't go.
        carrier: the root channel that stays a constant for all constants that no bias
            can stand for; None where there are none.
    """

    root: nn.Module
    handler: Callable[..., Any]
    roots: int
    inputs: Claims = field(default_factory=dict)
    outputs: Claims = field(default_factory=dict)
    stay: dict[int, str] = field(default_factory=dict)
    carrier: int | None = None

    def going(self) -> set[int]:
        """Return the root channels that nothing holds back."""
        return set(range(self.roots)) - self.stay.keys()

    def keep(self, roots: set[int], why: str) -> None:
        """Let root channels stay."""
        for root in roots:
            self.stay.setdefault(root, why)

    def keep_all(self, why: str) -> None:
        """Let all stay."""
        self.keep(set(range(self.roots)), why)

    def channels(self, claims: Claims) -> dict[nn.Module, set[int]]:
        """Return which channels of layers go."""
        going = self.going()
        found = {m: {i for i, r in c.items() if r & going} for m, c in claims.items()}
        return {module: channels for module, channels in found.items() if channels}


@dataclass
class Rules:
    """What holds channels back.

    Attributes:
        reads: what layers read, by ``Probe.reads``.
        masks: of the weights of layers.
        names: of layers.
    """

    reads: Mapping[nn.Module, Reads]
    masks: Mapping[nn.Module, Tensor]
    names: Mapping[nn.Module, str]

    def settle(self, coupled: Coupled) -> None:
        """Find what holds root channels back."""
        readers = [m for m in coupled.inputs if is_reader(m)]
        if not readers:
            coupled.keep_all("no layer reads them: they are outputs of the model")
        for module in readers:
            self._settle_reader(coupled, module)
        self._find_carrier(coupled, [m for m in readers if not folds(m)])
        before = -1
        while before != len(coupled.stay):
            before = len(coupled.stay)
            for claims in (coupled.inputs, coupled.outputs):
                for module in claims:
                    for roots in claims[module].values():
                        if roots & coupled.stay.keys():
                            coupled.keep(roots, "others that go with them stay")
                    self._leave_one(coupled, module, claims)
                    self._fit_groups(coupled, module, claims)

    def _settle_reader(self, coupled: Coupled, module: nn.Module) -> None:
        """Hold back what depends on the inputs."""
        reads, name, used = (
            self.reads.get(module),
            self.names[module],
            self.used(module),
        )
        for channel, roots in coupled.inputs[module].items():
            if reads is None:
                coupled.keep(roots, f"{name!r} does not run on example_inputs")
            elif used[channel] and not reads.constant[channel]:
                coupled.keep(roots, f"what {name!r} reads there depends on the inputs")

    def used(self, module: nn.Module) -> Tensor:
        """Return of which input channels the mask keeps weights: bool [in]."""
        mask = self.masks.get(module)
        if mask is None:
            return torch.ones(size_of(module, True), dtype=torch.bool)
        if isinstance(module, TRANSPOSED):
            return mask.flatten(1).any(1)
        return by_input(module, mask.double()).any(0)

    def constants(self, module: nn.Module) -> Tensor:
        """Return the constants that a layer reads, 0 where there is none: [in]."""
        reads = self.reads[module]
        return reads.value.where(reads.constant, 0.0)

    def _find_carrier(self, coupled: Coupled, padding: list[nn.Module]) -> None:
        """Choose a channel whose constant stands for others beside padded zeros."""
        need, strength = set[int](), dict.fromkeys(coupled.going(), float("inf"))
        for module in padding:
            values, used = self.constants(module), self.used(module)
            claims = coupled.inputs[module]
            mine = {
                r: i for i, roots in claims.items() for r in roots & coupled.going()
            }
            needed = {r for r, i in mine.items() if values[i] != 0 and used[i]}
            if needed and groups_of(module) > 1:
                why = (
                    f"{self.names[module]!r} has groups, and pads constants with zeros"
                )
                coupled.keep(needed, why)
            elif needed:
                need |= needed
                for root in strength:
                    size = float(values[mine[root]].abs()) if root in mine else 0.0
                    strength[root] = min(strength[root], size)
        if need := need & coupled.going():
            carrier = max(coupled.going(), key=lambda root: (strength[root], -root))
            if strength[carrier] > 0:
                coupled.carrier = carrier
                why = "carries the constants of others, which are no bias beside zeros"
                coupled.keep({carrier}, why)
            else:
                coupled.keep(need, "constants other than 0 are no bias beside zeros")

    def _leave_one(self, coupled: Coupled, module: nn.Module, claims: Claims) -> None:
        """Let a layer have one channel at least, in each of its groups."""
        total = size_of(module, claims is coupled.inputs)
        going = coupled.channels(claims).get(module, set())
        if going and len(going) == total:
            width = total // groups_of(module)
            firsts = (claims[module][i] for i in range(0, total, width))
            coupled.keep(set().union(*firsts), f"{self.names[module]!r} needs one")

    def _fit_groups(self, coupled: Coupled, module: nn.Module, claims: Claims) -> None:
        """Let all groups of a convolution lose as many outputs, or the same inputs."""
        groups = groups_of(module)
        if groups == 1:
            return
        inputs = claims is coupled.inputs
        width = size_of(module, inputs) // groups
        going = coupled.channels(claims).get(module, set())
        parts = [[i for i in going if i // width == g] for g in range(groups)]
        if inputs:
            same = set.intersection(*({i % width for i in part} for part in parts))
            fit = {i for i in going if i % width in same}
        else:
            most = min(map(len, parts))
            fit = {i for part in parts for i in sorted(part)[:most]}
        over = set().union(*(claims[module][i] for i in going - fit))
        coupled.keep(over, f"other groups of {self.names[module]!r} keep theirs")
