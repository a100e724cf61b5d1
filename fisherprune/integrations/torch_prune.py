"""Masks to and from ``torch.nn.utils.prune``, and a pruning method for its API."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fisherprune.errors import FieldError, shown
from fisherprune.masks.masks import Masks
from fisherprune.masks.select import select_masks
from fisherprune.modules import named_modules
from fisherprune.parameters import checked_model, fitted_names

Place = tuple[nn.Module, str]
"""A module, and what it calls a parameter; a shared parameter has several places."""


def apply_masks(masks: Mapping[str, Tensor], model: nn.Module) -> None:
    """Prune the model's modules by ``prune.custom_from_mask``.

    Optimizers go on with the same parameters, which are now called ``weight_orig``.
    What is pruned already stays pruned. A shared weight is masked in each module.

    Args:
        masks: bool tensors by parameter name, True = kept.
        model: has the parameters; it may be wrapped.

    Raises:
        FisherpruneError: where it has no such parameter, or one of another shape;
            nothing is changed then.

    Example:
        >>> import torch, fisherprune
        >>> layer = torch.nn.Linear(2, 1)
        >>> masks = fisherprune.Masks({"weight": torch.tensor([[True, False]])})
        >>> apply_masks(masks, layer)
        >>> layer.weight_mask, masks_of(layer) == masks
        (tensor([[1., 0.]]), True)
    """
    for mask, places in _placed("apply_masks: masks", Masks(masks), model).values():
        for module, name in places:
            device = getattr(module, name).device
            prune.custom_from_mask(module, name, mask.to(device))


def masks_of(model: nn.Module) -> Masks:
    """Return the masks of a model that ``torch.nn.utils.prune`` has pruned.

    Returns:
        Bool masks, True = kept, by the names that the parameters have after ``remove``.

    Raises:
        FisherpruneError: where nothing is pruned, a mask has other values than 0 and 1,
            or modules mask a weight that they share differently.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> masks_of(prune.l1_unstructured(torch.nn.Linear(4, 2), "weight", amount=6))
        Masks(1 parameters, 2 of 8 weights kept)
    """
    masks = {}
    for name, places in _places(model).items():
        found = [_mask(*place) for place in places]
        first = next((mask for mask in found if mask is not None), None)
        if first is None:
            continue
        if any(mask is None or not torch.equal(mask, first) for mask in found):
            wanted = "the same in all modules that share it"
            raise FieldError(f"masks_of: mask of {name!r}", wanted, "different ones")
        masks[name] = first != 0
        if not torch.equal(masks[name].to(first.dtype), first):
            raise FieldError(f"masks_of: mask of {name!r}", "of 0 and 1", shown(first))
    if not masks:
        kind = type(model).__name__
        raise FieldError("masks_of: model", "pruned by torch.nn.utils.prune", kind)
    return Masks(masks)


def remove(model: nn.Module) -> Masks:
    """Make parameters of all pruned tensors by ``prune.remove``; pruned weights are 0.

    Returns:
        What ``masks_of`` does; ``remove(model).hold(model, optimizer)`` goes on.

    Raises:
        FisherpruneError: for any reason of ``masks_of``; nothing is changed then.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(torch.nn.Linear(4, 2), "weight", amount=6)
        >>> hold = remove(layer).hold(layer)
        >>> int(layer.weight.count_nonzero()), sorted(layer.state_dict())
        (2, ['bias', 'weight'])
    """
    masks, places = masks_of(model), _places(model)
    for name in masks:
        for module, attribute in places[name]:
            prune.remove(module, attribute)
    return masks


def importance_scores(
    scores: Mapping[str, Tensor], model: nn.Module
) -> dict[Place, Tensor]:
    """Return scores by parameter name as ``prune.global_unstructured`` takes them.

    Raises:
        FisherpruneError: where the model has no such parameter, one of another shape,
            or one that modules share, whose copies torch would mask apart.
    """
    placed = _placed("importance_scores: scores", scores, model)
    for name, (_, places) in placed.items():
        if len(places) > 1:
            wanted = "of parameters of one module each (apply_masks takes shared ones)"
            raise FieldError("importance_scores: scores", wanted, f"shared {name!r}")
    return {places[0]: score.contiguous() for score, places in placed.values()}


class FisherPruning(prune.BasePruningMethod):
    """Keep the largest scores exactly, as ``fisherprune.select_masks`` does.

    Args:
        amount: fraction of the weights removed, in [0, 1], of which ``keep_count`` are
            kept, at least one; or, an integer, their number, less than all.
        ties: "error" or "position", as in ``select_masks``.

    Raises:
        FisherpruneError: for any reason of ``select_masks``, and where there are no
            ``importance_scores``: weights themselves are no scores.

    Example:
        >>> import torch, fisherprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 3))
        >>> batches = [(torch.randn(16, 5), torch.randint(3, (16,)))]
        >>> (masks,) = fisherprune.find_masks(net, batches, "fts", [0.9])
        >>> scores = importance_scores(fisherprune.score(net, batches, "fts"), net)
        >>> prune.global_unstructured(
        ...     scores.keys(), FisherPruning, importance_scores=scores, amount=0.9
        ... )
        >>> masks_of(net) == masks
        True
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float, ties: str = "error") -> None:
        self.amount, self.ties = amount, ties

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the mask of scores ``t`` among what ``default_mask`` keeps."""
        if t.requires_grad:  # torch puts the weights in place of missing scores
            wanted = "scores, without a gradient, of all parameters"
            raise FieldError("FisherPruning: importance_scores", wanted, "weights")
        sparsity, name = self.amount, "importance_scores"
        if isinstance(sparsity, int):
            if not 0 <= sparsity < t.numel():
                wanted = f"at least 0 and less than the {t.numel()} weights"
                raise FieldError("FisherPruning: amount", wanted, sparsity)
            sparsity = sparsity / t.numel()
        among = {name: default_mask != 0}
        masks = select_masks({name: t}, sparsity, among=among, ties=self.ties)
        return masks[name].to(default_mask.dtype)


def _placed(
    what: str, tensors: Mapping[str, Tensor], model: nn.Module
) -> dict[str, tuple[Tensor, list[Place]]]:
    """Pair tensors with the places of the parameters whose names and shapes they have.

    Raises:
        FisherpruneError: where there is none.
    """
    own, placed = _places(model), {}
    names = fitted_names(tensors, own) or {}
    for name, tensor in tensors.items():
        places = own.get(names.get(name, name))
        if places is None:
            kind = type(model).__name__
            raise FieldError(what, f"of parameters of {kind}", f"one of {name!r}")
        shape = [*getattr(*places[0]).shape]
        if [*tensor.shape] != shape:
            wanted = f"of shape {shape}"
            raise FieldError(f"{what} of {name!r}", wanted, [*tensor.shape])
        placed[name] = tensor, places
    return placed


def _places(model: nn.Module) -> dict[str, list[Place]]:
    """Return where parameters are, by the names of those that aren't pruned yet."""
    names, places = dict[int, str](), dict[str, list[Place]]()
    for path, module in named_modules(checked_model(model)):
        for own, parameter in module._parameters.items():
            if parameter is not None:
                base = own.removesuffix("_orig")
                attribute = base if _mask(module, base) is not None else own
                full = f"{path}.{attribute}".lstrip(".")
                name = names.setdefault(id(parameter), full)
                places.setdefault(name, []).append((module, attribute))
    return places


def _mask(module: nn.Module, attribute: str) -> Tensor | None:
    """Return the mask by which torch prunes a parameter, None where it does not."""
    is_pruned = f"{attribute}_orig" in module._parameters
    return module._buffers.get(f"{attribute}_mask") if is_pruned else None
