"""The masks of a model: which of its weights are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, shown
from fisherprune.masks.apply import pruned_weights, warn_of_collapse
from fisherprune.masks.checks import checked_masks
from fisherprune.masks.compare import (
    is_same_in_shards,
    overlaps,
    paired,
    share,
)
from fisherprune.masks.files import read_masks, write_masks
from fisherprune.masks.hold import Hold
from fisherprune.shards import any_shard, check_whole, count_true, local, whole_of


class Masks(Mapping[str, Tensor]):
    """Bool masks by parameter name, True = kept.

    Of a model whose parameters are in shards (FSDP2, DTensor) they are in shards, too:
    then what counts or compares them is asked of all ranks together.

    They are equal to others of the same names, shapes and bits, on whatever device; so
    they can't be hashed, as other mappings. ``&`` keeps what both keep, ``|`` what
    either keeps, ``~`` what was removed. Names that differ by what wrappers of a model
    put into them (``_orig_mod``, ``module``) are those of one parameter, but not for
    ``==``.

    Args:
        masks: bool tensors of the parameters' shapes.

    Raises:
        FisherpruneError: where there is no mask, one is no dense bool tensor, or a name
            is no string.

    Example:
        >>> import torch
        >>> masks = Masks({"a": torch.tensor([True, False, True, False])})
        >>> masks
        Masks(1 parameters, 2 of 4 weights kept)
        >>> masks == ~~masks, (masks & ~masks).kept(), (masks | ~masks).kept()
        (True, 0, 4)
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = checked_masks(masks, "Masks")
        self._warned = False

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        if any_shard(self.values()):  # one rank alone may print it
            return f"Masks({len(self)} parameters, {self.total()} weights, in shards)"
        kept, total = self.kept(), self.total()
        return f"Masks({len(self)} parameters, {kept} of {total} weights kept)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        if self.keys() != other.keys():
            return False
        pairs = [(mask, other[name]) for name, mask in self.items()]
        bools = all(isinstance(o, Tensor) and o.dtype == torch.bool for _, o in pairs)
        if bools and any_shard(each for pair in pairs for each in pair):
            return is_same_in_shards(self, other)
        return bools and all(torch.equal(m, o.to(m.device)) for m, o in pairs)

    __hash__ = None  # type: ignore[assignment]  # the values can be changed

    def __and__(self, other: Mapping[str, Tensor]) -> Masks:
        return self._combined(other, "&", torch.logical_and)

    def __or__(self, other: Mapping[str, Tensor]) -> Masks:
        return self._combined(other, "|", torch.logical_or)

    def _combined(
        self,
        other: Mapping[str, Tensor],
        sign: str,
        combine: Callable[[Tensor, Tensor], Tensor],
    ) -> Masks:
        if not isinstance(other, Mapping):
            return NotImplemented
        pairs = paired(self, other, sign).items()
        return Masks({name: combine(*pair) for name, pair in pairs})

    def __invert__(self) -> Masks:
        return Masks({name: ~mask for name, mask in self.items()})

    def to(self, device: torch.device | str | int) -> Masks:
        """Return the masks on a device.

        Raises:
            FisherpruneError: where it is no device.

        Example:
            >>> import torch
            >>> Masks({"a": torch.ones(3) > 0}).to("cpu")["a"].device
            device(type='cpu')
        """
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError, ValueError):
            raise FieldError("to: device", "a torch device", shown(device)) from None
        return Masks({name: mask.to(place) for name, mask in self.items()})

    def whole(self) -> Masks:
        """Return masks that are in shards as whole ones, on each rank.

        All ranks must ask for them. Others are returned as they are.

        Example:
            >>> import torch
            >>> masks = Masks({"a": torch.eye(2) > 0})
            >>> masks.whole() == masks
            True
        """
        return Masks({name: whole_of(mask) for name, mask in self.items()})

    def kept(self) -> int:
        """Return the number of weights kept.

        Example:
            >>> import torch
            >>> masks = Masks({"a": torch.ones(4) > 0, "b": torch.eye(2) > 0})
            >>> masks.kept()
            6
        """
        return sum(count_true(self).values())

    def total(self) -> int:
        """Return the number of weights under a mask.

        Example:
            >>> import torch
            >>> Masks({"a": torch.ones(4) > 0, "b": torch.eye(2) > 0}).total()
            8
        """
        return sum(mask.numel() for mask in self.values())

    def sparsity(self) -> float:
        """Return the fraction of the weights removed; 0 where there are none.

        Example:
            >>> import torch
            >>> Masks({"a": torch.eye(4) > 0}).sparsity()
            0.75
        """
        return 1 - share(self.kept(), self.total())

    def density(self) -> dict[str, float]:
        """Return the fraction of weights kept in each parameter.

        Example:
            >>> import torch
            >>> Masks({"a": torch.ones(4) > 0, "b": torch.eye(2) > 0}).density()
            {'a': 1.0, 'b': 0.5}
        """
        kept = count_true(self)
        return {n: share(kept[n], mask.numel()) for n, mask in self.items()}

    def jaccard(self, other: Mapping[str, Tensor]) -> float:
        """Return the overlap with other masks: weights kept by both / by either.

        Over all parameters together; 1 where neither keeps any.

        Raises:
            FisherpruneError: where ``other`` holds no masks, or its masks are of other
                parameters or shapes.

        Example:
            >>> import torch
            >>> masks = Masks({"a": torch.eye(2) > 0})
            >>> masks.jaccard({"a": torch.ones(2, 2) > 0})
            0.5
        """
        both, either = zip(*overlaps(self, other).values(), strict=True)
        return share(sum(both), sum(either))

    def jaccard_by_layer(self, other: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the overlap of each parameter's masks; see ``jaccard``.

        Example:
            >>> import torch
            >>> masks = Masks({"a": torch.ones(2) > 0, "b": torch.eye(2) > 0})
            >>> masks.jaccard_by_layer({"a": masks["a"], "b": ~masks["b"]})
            {'a': 1.0, 'b': 0.0}
        """
        return {name: share(*pair) for name, pair in overlaps(self, other).items()}

    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of ``model`` to zero, once.

        Names fit whether the model or the one that the masks were made of is wrapped,
        by ``torch.compile`` or ``DistributedDataParallel``. Of a model in shards each
        rank prunes its own; whole masks fit it as well. Where the masks keep no
        weight of a layer, a ``LayerCollapseWarning`` names it, once for these masks.

        Raises:
            FisherpruneError: where the model has no such parameter, or its shape is
                another.

        Example:
            >>> import torch
            >>> layer = torch.nn.Linear(2, 1)
            >>> Masks({"weight": torch.tensor([[True, False]])}).apply_(layer)
            >>> layer.weight[0, 1].item()
            0.0
        """
        pairs = pruned_weights(self, model)
        with torch.no_grad():
            for parameter, pruned in pairs.values():
                local(parameter).masked_fill_(pruned, 0.0)
        self._warn_of_collapse()

    def _warn_of_collapse(self) -> None:
        if not self._warned:
            self._warned = True
            warn_of_collapse(self, stacklevel=3)

    def hold(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> Hold:
        """Keep the pruned weights of ``model`` exactly zero while it trains.

        Sets them and their optimizer state to zero now, so momentum from before the
        mask does not move them; masks their gradients whenever a backward pass has
        added to them, so clipping and norms see the pruned network's; and sets them to
        zero after each step of any ``torch.optim`` optimizer that trains one of them,
        inside of which other optimizer it may be, whatever it adds.

        What writes weights in another way (by hand, ``p.data.add_`` or an average over
        steps that is copied back; an optimizer without gradients or not of torch;
        ``baselines.reinitialize_``) is undone by what comes first of these:

        - the next such step;
        - the next call of ``model``, of what it wraps or of what wraps it; not of one
          of its layers, and not where ``torch.compile`` has compiled the call of
          ``model`` itself, but where ``model`` is what ``torch.compile`` returned;
        - ``state_dict()`` and ``load_state_dict()``, of a part of the model too;
        - ``apply_``.

        A parameter that is replaced by another one is held if ``load_state_dict(
        assign=True)`` did it; else hold anew. So is a copy (``copy.deepcopy``) of model
        and optimizer. Where two optimizers train the model, give the masks in two
        parts, ``Masks({name: masks[name] for name in names})``, each with its
        optimizer, or give no optimizer.

        A hold needs one integer of the weight's size and one byte a masked weight. It
        lasts until it is removed or the model is gone.

        Args:
            model: the model that ``optimizer`` trains.
            optimizer: a ``torch.optim`` optimizer over all masked parameters, or one
                that has it among its attributes (sharpness-aware minimization,
                Lookahead, Accelerate's); frozen parameters (``requires_grad`` False)
                may be missing. The state is cleaned of each one that is found, in what
                it keeps by parameter. Without ``optimizer`` no state is cleaned: the
                weights are zero after each step all the same, but momentum of pruned
                weights from before the hold stays in the state, and moves them when
                the hold has ended.

        Returns:
            A handle; ``remove()`` or leaving its ``with`` block ends it,
            ``update(masks)`` goes on with other masks.

        Raises:
            FisherpruneError: where the masks do not fit the model, or the optimizer
                does not train a masked parameter; nothing is changed then.

        Example:
            >>> import torch
            >>> layer = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            >>> masks = Masks({"weight": torch.tensor([[True, False]])})
            >>> with masks.hold(layer, optimizer):
            ...     layer(torch.ones(4, 2)).mean().backward()
            ...     optimizer.step()
            >>> layer.weight[0, 1].item()
            0.0
        """
        hold = Hold(model, pruned_weights(self, model), optimizer)
        self._warn_of_collapse()
        return hold

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, whole or not at all.

        Raises:
            OSError: where it can't be written.
            FisherpruneError: where ``path`` is no path, or masks are in shards: then
                all ranks ask for ``whole()``, and one saves these.

        Example:
            >>> import tempfile, torch
            >>> masks = Masks({"a": torch.tensor([True, False])})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     masks.save(f"{folder}/masks.safetensors")
            ...     Masks.load(f"{folder}/masks.safetensors") == masks
            True
        """
        check_whole("save: masks", "masks.whole().save(path) on one rank", self)
        write_masks(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read masks onto the CPU: of ``save``, or any safetensors file of bools.

        Raises:
            FisherpruneError: where the file is missing, damaged or holds anything else,
                or ``path`` is no path.

        Example:
            >>> import tempfile, torch
            >>> from safetensors.torch import save_file
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     save_file({"a": torch.eye(2) > 0}, f"{folder}/bools")
            ...     Masks.load(f"{folder}/bools")
            Masks(1 parameters, 2 of 4 weights kept)
        """
        return cls(read_masks(path))
