"""Torch-Pruning: the importance of channels, from exact statistics of the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError
from fisherprune.scoring.score import score
from fisherprune.statistics.batches import Batches

Owners = list[Tensor]
"""Number of the channel that a parameter's entries go with, of dimensions that fit."""


class FisherImportance:
    r"""Importance of a group's channels for the pruners of Torch-Pruning.

    .. math:: I_i = \sum_{w \in R_i} s(w)

    with R_i all the weights that Torch-Pruning removes with channel i: of every layer
    of the group, outputs and inputs, biases and normalization too, each once. Scores s
    are those of a criterion, by default :math:`w^2 F / 2` with F of every single
    sample. (``GroupHessianImportance`` means the same, but keeps the square of the
    last sample that was accumulated alone.) Sums of different layers can be compared,
    so they suit ``global_pruning=True``; they are not normalized.

    A pruner asks before it prunes. Where weights or shapes have changed since, in the
    next step of several, the model is scored anew. A layer whose channels Torch-Pruning
    leads back to no single channel, as keys that heads share, adds nothing, as in its
    own importances.

    Args:
        model: that the pruner prunes.
        batches: as in ``fisherprune.score``; read anew at each scoring.
        criterion: one of ``fisherprune.criteria()``.
        options: of ``fisherprune.score`` besides ``parameters``: all are scored.

    Raises:
        FisherpruneError: when the pruner asks, where a group is of another model, or
            for any reason of ``fisherprune.score``.

    Reference:
        Fang et al., "DepGraph: Towards Any Structural Pruning", 2023; Theis et al.,
        "Faster gaze prediction with dense networks and Fisher pruning", 2018.

    Example:
        >>> import torch_pruning
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batches = [(torch.randn(16, 4), torch.randint(3, (16,)))]
        >>> importance = FisherImportance(net, batches)
        >>> pruner = torch_pruning.pruner.BasePruner(
        ...     net, batches[0][0], importance, ignored_layers=[net[2]]
        ... )  # half of the channels
        >>> pruner.step()
        >>> net[0].out_features, net[2].in_features
        (4, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        criterion: str = "fisher_pruner",
        **options: Any,
    ) -> None:
        self.model, self.batches = model, batches
        self.criterion, self.options = criterion, options
        self._state: list[tuple[nn.Parameter, int]] = []
        self._scores: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor:
        """Return the importance of the channels of a group's first layer: [channels].

        Args:
            group: ``torch_pruning.Group``.
        """
        scores, owners = self._current_scores(), dict[int, Owners]()
        numbers = {root: i for i, root in enumerate(group[0].root_idxs)}
        for item in group:
            roots = item.root_idxs
            if None in roots or not set(roots) <= numbers.keys():
                continue
            channels = torch.tensor([*map(numbers.get, roots), len(numbers)])
            for key, codes in _removed(item.dep, item.idxs):
                owners.setdefault(key, []).append(channels[codes - 1])
        if missing := owners.keys() - scores.keys():
            wanted = "of the model that FisherImportance was given"
            raise FieldError("torch_pruning: group", wanted, f"{len(missing)} others")
        total = torch.zeros(len(numbers) + 1, dtype=torch.float64)
        for key, each in owners.items():
            _add(total, scores[key], each)
        return total[:-1]

    def _current_scores(self) -> dict[int, Tensor]:
        named = {
            n: p for n, p in self.model.named_parameters() if p.is_floating_point()
        }
        state = [(p, p._version) for p in named.values()]
        old = [(id(p), version) for p, version in self._state]
        if old != [(id(p), version) for p, version in state]:
            options = {"parameters": named, **self.options}
            found = score(self.model, self.batches, self.criterion, **options)
            self._state = state
            self._scores = {id(p): found[n].double().cpu() for n, p in named.items()}
        return self._scores


def _add(total: Tensor, scores: Tensor, owners: Owners) -> None:
    """Add each entry's score to the channels that it goes with, once to each."""
    for i, mine in enumerate(owners):
        left = scores
        for other in owners[:i]:
            left = left.where(mine != other, 0)
        wide = [d for d, size in enumerate(mine.shape) if size == 1]
        sums = left.sum(wide, keepdim=True) if wide else left
        total.index_add_(0, mine.flatten(), sums.flatten())


def _removed(dep: Any, idxs: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield a parameter's id, and for its entries which index removes them.

    That is the place of the index from 1, or 0. Torch-Pruning itself says it: it prunes
    copies of the layer that hold places instead of weights, once for each bit of the
    places, and one entry where it does not cut a dimension.
    """
    layer = dep.target.module
    if _reads_in_groups(dep):
        yield id(layer.weight), _of_grouped_inputs(layer, idxs)
        return
    named, cut, places = _named(layer), dict[str, list[int]](), dict[int, Tensor]()
    shapes = {id(p): torch.empty(p.shape, device="meta") for p in named.values()}
    for name, left in _pruned(dep, idxs[:1], shapes).items():
        p = named[name]
        cut[name] = [d for d, size in enumerate(p.shape) if left.shape[d] != size]
        sizes = [size if d in cut[name] else 1 for d, size in enumerate(p.shape)]
        every = torch.arange(math.prod(sizes), dtype=torch.float64)
        places[id(p)] = every.view(sizes)
    none = torch.zeros((), dtype=torch.int64)
    codes = {(n, d): none for n, dimensions in cut.items() for d in dimensions}
    for bit in range(len(idxs).bit_length()):
        chosen = [idx for place, idx in enumerate(idxs, 1) if place >> bit & 1]
        for name, left in _pruned(dep, chosen, places).items():
            for d in cut[name]:
                gone = _gone(left, places[id(named[name])].shape, d)
                codes[name, d] = codes[name, d] + (gone.long() << bit)
    for (name, _), code in codes.items():
        yield id(named[name]), code


def _named(layer: nn.Module | nn.Parameter) -> dict[str, nn.Parameter]:
    return {"": layer} if isinstance(layer, Tensor) else dict(layer.named_parameters())


def _gone(left: Tensor, shape: torch.Size, d: int) -> Tensor:
    """Return which places in a dimension are gone, in a shape that fits the others."""
    gone = torch.ones(shape[d], dtype=torch.bool)
    if left.numel():
        line = left.movedim(d, -1)[(0,) * (len(shape) - 1)].long()
        gone[line // math.prod(shape[d + 1 :]) % shape[d]] = False
    return gone.view([1] * d + [-1] + [1] * (len(shape) - d - 1))


def _pruned(
    dep: Any, idxs: Sequence[int], entries: Mapping[int, Tensor]
) -> Mapping[str, Tensor]:
    """Return what Torch-Pruning leaves of a layer with such entries of parameters."""
    asked = copy.copy(dep)
    asked.target = copy.copy(dep.target)
    asked.target.module = layer = _copied(dep.target.module, entries)
    pruned = asked(list(idxs))  # a lone parameter comes back, a layer is changed
    left = _named(pruned if isinstance(layer, Tensor) else layer)
    return {name: p.detach() for name, p in left.items()}


def _copied(layer: nn.Module | nn.Parameter, entries: Mapping[int, Tensor]) -> Any:
    if isinstance(layer, Tensor):
        return nn.Parameter(entries[id(layer)])
    made = copy.copy(layer)
    made._buffers = dict(layer._buffers)
    parts = layer._modules.items(), layer._parameters.items()
    made._modules, made._parameters = (
        {n: part if part is None else _copied(part, entries) for n, part in named}
        for named in parts
    )
    return made


def _reads_in_groups(dep: Any) -> bool:
    layer, inputs = dep.target.module, dep.handler.__name__ == "prune_in_channels"
    is_conv = inputs and isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return is_conv and 1 < layer.groups < layer.out_channels


def _of_grouped_inputs(layer: nn.Conv2d, idxs: Sequence[int]) -> Tensor:
    """Return codes: an entry reads the channels of its output's group alone.

    Torch-Pruning can remove channels of all groups together only.
    """
    codes = torch.zeros(layer.in_channels, dtype=torch.int64)
    codes[torch.tensor(idxs)] = torch.arange(1, len(idxs) + 1)
    outputs, inputs = layer.weight.shape[:2]
    group = torch.arange(outputs) // (outputs // layer.groups)
    codes = codes[group[:, None] * inputs + torch.arange(inputs)]
    return codes.view(outputs, inputs, *[1] * (layer.weight.dim() - 2))
