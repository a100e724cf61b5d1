"""Torch-Pruning's graph of a model: which channels depend on which."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fisherprune.errors import FisherpruneError, shown
from fisherprune.modules import TRANSPOSED
from fisherprune.packages import required
from fisherprune.sparse.channels import (
    NORMALIZATIONS,
    groups_of,
    is_passing,
    is_reader,
    size_of,
)
from fisherprune.sparse.coupled import Coupled, Rules
from fisherprune.sparse.probing import Probe, Reads
from fisherprune.statistics.structure import tensors_in


class Graph:
    """The groups of channels that go together, and what of them can go.

    Args:
        probe: of the model, with gradients of all parameters on.
        reads: of its layers, by ``Probe.reads``.
        masks: of the weights of layers.

    Raises:
        FisherpruneError: where Torch-Pruning isn't installed, or fails.
    """

    def __init__(
        self,
        probe: Probe,
        reads: Mapping[nn.Module, Reads],
        masks: Mapping[nn.Module, Tensor],
    ) -> None:
        self.probe = probe
        self.names = {module: name for name, module in probe.model.named_modules()}
        self.owners = Counter(
            id(p)
            for module in self.names
            for p in module._parameters.values()
            if p is not None
        )
        self.rules = Rules(reads, masks, self.names)
        self.graph = _traced(probe)
        self.coupled = [self._coupled(group) for group in self.graph.get_all_groups()]
        for coupled in self.coupled:
            self.rules.settle(coupled)
        self._check_ways()

    def prune(self) -> None:
        """Remove all channels that go, of all parameters and their gradients."""
        for coupled in self.coupled:
            if going := sorted(coupled.going()):
                found = coupled.root, coupled.handler, going
                self.graph.get_pruning_group(*found).prune()

    def _coupled(self, group: Any) -> Coupled:
        """Read a group of all channels of its root."""
        first = group[0]
        coupled = Coupled(first.dep.target.module, first.dep.handler, len(first.idxs))
        for item in group:
            module = item.dep.target.module
            if isinstance(module, nn.Parameter):
                coupled.keep_all("they meet a parameter that belongs to no layer")
            if module not in self.names:
                continue
            name = self.names[module]
            if why := self._why_not(module):
                coupled.keep_all(f"{name!r} {why}")
            reading = item.dep.handler.__name__ == "prune_in_channels"
            size = size_of(module, reading)
            claims = [coupled.inputs if reading else coupled.outputs]
            if is_passing(module):
                claims = [coupled.inputs, coupled.outputs]
            for channel, root in zip(item.idxs, item.root_idxs, strict=True):
                if root is None or channel >= size > 0:
                    coupled.keep_all(f"Torch-Pruning can't follow them to {name!r}")
                    continue
                for each in claims:
                    each.setdefault(module, {}).setdefault(channel, set()).add(root)
        return coupled

    def _why_not(self, module: nn.Module) -> str:
        """Say why no channel of a layer can go."""
        if not (is_reader(module) or is_passing(module)):
            return f"is a {type(module).__name__}, which keeps all"
        computed = module._parameters.get("weight") is None
        if computed and not isinstance(module, NORMALIZATIONS):
            return "computes its weight from other parameters"
        if any(self.owners[id(p)] > 1 for p in module.parameters()):
            return "shares a parameter with another layer"
        if isinstance(module, TRANSPOSED) and groups_of(module) > 1:
            return "is a transposed convolution with groups, which keeps all"
        return ""

    def _check_ways(self) -> None:
        """See where the channels really go, all at once, else group by group."""
        some = [coupled for coupled in self.coupled if coupled.going()]
        if some and self._misled(some):
            for coupled in some:
                if why := self._misled([coupled]):
                    coupled.keep_all(why)

    def _misled(self, some: Sequence[Coupled]) -> str:
        sources, claims = dict[nn.Module, set[int]](), dict[nn.Module, set[int]]()
        for coupled in some:
            for module, channels in coupled.channels(coupled.outputs).items():
                if is_reader(module):
                    sources.setdefault(module, set()).update(channels)
            for module, channels in coupled.channels(coupled.inputs).items():
                claims.setdefault(module, set()).update(channels)
        return self.probe.misled(sources, claims)


def _traced(probe: Probe) -> Any:
    """Let Torch-Pruning trace the model."""
    remedy = "pip install 'fisherprune[torch-pruning]'"
    library: Any = required(
        "torch_pruning", "fisherprune.sparse.shrink needs torch_pruning", remedy
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return library.DependencyGraph().build_dependency(
                probe.model,
                probe.example,
                forward_fn=lambda *_: probe.run(),
                output_transform=lambda out: [
                    t for t in tensors_in(out) if t.grad_fn is not None
                ],
                verbose=False,
            )
    except FisherpruneError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {shown(str(error))}"
        wanted = "shrink: Torch-Pruning must be able to trace the model"
        raise FisherpruneError(f"{wanted}, got {got}") from error
