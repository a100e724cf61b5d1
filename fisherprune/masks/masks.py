"""Masks: which weights are kept, how they are compared, applied and written."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fisherprune.errors import (
    FieldError,
    FisherpruneError,
    LayerCollapseWarning,
    shown,
)
from fisherprune.files import write_bytes
from fisherprune.masks.hold import Hold, trained_by
from fisherprune.parameters import checked_model, fitted_names, plain_parameters

FORMAT = "fisherprune-masks-1"


class Masks(Mapping[str, Tensor]):
    """Bool masks by parameter name, True = kept.

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
        self._masks = _checked(masks, "Masks")
        self._warned = False

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        kept, total = self.kept(), self.total()
        return f"Masks({len(self)} parameters, {kept} of {total} weights kept)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        if self.keys() != other.keys():
            return False
        pairs = [(mask, other[name]) for name, mask in self.items()]
        bools = all(isinstance(o, Tensor) and o.dtype == torch.bool for _, o in pairs)
        return bools and all(torch.equal(m, o.to(m.device)) for m, o in pairs)

    __hash__ = None  # type: ignore[assignment]  # the values can be changed

    def __and__(self, other: Mapping[str, Tensor]) -> Masks:
        if not isinstance(other, Mapping):
            return NotImplemented
        pairs = self._paired(other, "&").items()
        return Masks({name: mask & theirs for name, (mask, theirs) in pairs})

    def __or__(self, other: Mapping[str, Tensor]) -> Masks:
        if not isinstance(other, Mapping):
            return NotImplemented
        pairs = self._paired(other, "|").items()
        return Masks({name: mask | theirs for name, (mask, theirs) in pairs})

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

    def kept(self) -> int:
        """Return the number of weights kept.

        Example:
            >>> import torch
            >>> masks = Masks({"a": torch.ones(4) > 0, "b": torch.eye(2) > 0})
            >>> masks.kept()
            6
        """
        # count_nonzero: sum first widens every bool to an int64
        return sum(int(torch.count_nonzero(mask)) for mask in self.values())

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
        total = self.total()
        return 1 - self.kept() / total if total else 0.0

    def density(self) -> dict[str, float]:
        """Return the fraction of weights kept in each parameter.

        Example:
            >>> import torch
            >>> Masks({"a": torch.ones(4) > 0, "b": torch.eye(2) > 0}).density()
            {'a': 1.0, 'b': 0.5}
        """
        return {
            name: int(torch.count_nonzero(mask)) / mask.numel() if mask.numel() else 1.0
            for name, mask in self.items()
        }

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
        counts = self._overlaps(other).values()
        return _ratio(sum(b for b, _ in counts), sum(e for _, e in counts))

    def jaccard_by_layer(self, other: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the overlap of each parameter's masks; see ``jaccard``.

        Example:
            >>> import torch
            >>> masks = Masks({"a": torch.ones(2) > 0, "b": torch.eye(2) > 0})
            >>> masks.jaccard_by_layer({"a": masks["a"], "b": ~masks["b"]})
            {'a': 1.0, 'b': 0.0}
        """
        counts = self._overlaps(other).items()
        return {name: _ratio(both, either) for name, (both, either) in counts}

    def _overlaps(self, other: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
        """Count the weights that both keep, and those that either keeps, by name."""
        return {
            name: (
                int(torch.count_nonzero(mask & theirs)),
                int(torch.count_nonzero(mask | theirs)),
            )
            for name, (mask, theirs) in self._paired(other, "jaccard").items()
        }

    def _paired(
        self, other: Mapping[str, Tensor], where: str
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Pair own and other masks, on the own device; errors begin with ``where``."""
        other = _checked(other, where)
        names = fitted_names(self, other)
        if names is None or len(self) != len(other):
            odd = sorted(set(self) ^ set(other))
            raise FisherpruneError(
                f"{where}: masks must be of the same parameters, {odd[0]!r} is in one "
                "of them alone"
            )
        pairs = {}
        for name, mask in self.items():
            theirs = other[names[name]]
            if mask.shape != theirs.shape:
                raise FisherpruneError(
                    f"{where}: masks of {name!r} must have one shape, got "
                    f"{list(mask.shape)} and {list(theirs.shape)}"
                )
            pairs[name] = mask, theirs.to(mask.device)
        return pairs

    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of ``model`` to zero, once.

        Names fit whether the model or the one that the masks were made of is wrapped,
        by ``torch.compile`` or ``DistributedDataParallel``. Where the masks keep no
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
        pairs = self._pruned(model)
        with torch.no_grad():
            for parameter, pruned in pairs:
                parameter.masked_fill_(pruned, 0.0)
        self._warn_of_collapse()

    def _pruned(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Pair the model's parameters with the inverted masks on their devices."""
        named, pairs = plain_parameters(checked_model(model)), []
        names = fitted_names(self, named) or dict(zip(self, self, strict=True))
        for name, mask in self.items():
            parameter = named.get(names[name])
            if parameter is None:
                raise FisherpruneError(
                    f"masks do not fit: {type(model).__name__} has no parameter "
                    f"{name!r}"
                )
            if parameter.shape != mask.shape:
                raise FisherpruneError(
                    f"masks do not fit: {name!r} of {type(model).__name__} has shape "
                    f"{list(parameter.shape)}, its mask {list(mask.shape)}"
                )
            pruned = torch.empty_like(parameter, dtype=torch.bool)
            pairs.append((parameter, pruned.copy_(~mask)))  # strides as the weight's
        return pairs

    def _warn_of_collapse(self) -> None:
        """Name the layers that keep no weight; a bias is no layer."""
        if self._warned:
            return
        self._warned = True
        gone = [
            name
            for name, mask in self.items()
            if not name.endswith("bias") and mask.numel() and not mask.any()
        ]
        if gone:
            some = ", ".join(map(repr, gone[:8])) + (", ..." if len(gone) > 8 else "")
            warnings.warn(
                f"masks keep no weight of {len(gone)} of {len(self)} parameters, so "
                f"nothing passes through these layers: {some}; a smaller sparsity or "
                'scope "erk" or "layer" keeps some',
                LayerCollapseWarning,
                stacklevel=3,
            )

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
            A handle; ``remove()`` or leaving its ``with`` block ends it.

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
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise FieldError("hold: optimizer", "of torch.optim", shown(optimizer))
        pairs = self._pruned(model)
        trained = None if optimizer is None else trained_by(optimizer)
        for name, (parameter, _) in zip(self, pairs, strict=True):
            missing = trained is not None and id(parameter) not in trained
            if parameter.requires_grad and missing:
                raise FisherpruneError(f"hold: the optimizer does not train {name!r}")
        hold = Hold(model, dict(pairs), optimizer)
        self._warn_of_collapse()
        return hold

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, whole or not at all.

        Raises:
            OSError: where it can't be written.
            FisherpruneError: where ``path`` is no path.

        Example:
            >>> import tempfile, torch
            >>> masks = Masks({"a": torch.tensor([True, False])})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     masks.save(f"{folder}/masks.safetensors")
            ...     Masks.load(f"{folder}/masks.safetensors") == masks
            True
        """
        # One entry: safetensors writes several in an order that differs each time.
        order = {FORMAT: json.dumps(list(self))}
        tensors = {name: _apart(mask) for name, mask in self.items()}
        write_bytes(_checked_path(path, "save"), save(tensors, metadata=order))

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
        path = _checked_path(path, "load")
        if not Path(path).is_file():
            raise FisherpruneError(f"mask file {path!r} does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                names = _saved_order(file)
                masks = {name: file.get_tensor(name) for name in names or ()}
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise FisherpruneError(
                f"mask file {path!r} can't be read: {error}"
            ) from None
        if names is None:
            raise FisherpruneError(f"{path!r} holds no masks")
        return cls(masks)


def _saved_order(file: safe_open) -> list[str] | None:
    """Return the names of a file's masks as they were saved; None: it holds none."""
    metadata = file.metadata() or {}
    if FORMAT in metadata:
        return json.loads(metadata[FORMAT])
    # written by another program, or before the order was
    names = list(file.keys())
    bools = all(file.get_slice(name).get_dtype() == "BOOL" for name in names)
    return names if names and bools else None


def _checked_path(path: str | os.PathLike[str], where: str) -> str:
    if not isinstance(path, str | os.PathLike):
        raise FieldError(f"{where}: path", "a path", shown(path))
    return os.fspath(path)


def _apart(mask: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU: a file takes no memory that is shared."""
    return mask.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _checked(masks: object, where: str) -> dict[str, Tensor]:
    """Return masks by name; errors begin with ``where``."""
    if not isinstance(masks, Mapping):
        raise FisherpruneError(
            f"{where}: masks must map parameter names to bool tensors, got "
            f"{shown(masks)}"
        )
    if not masks:
        raise FisherpruneError(f"{where}: masks must hold at least one mask, got none")
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise FisherpruneError(f"{where}: names must be strings, got {shown(name)}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else shown(mask)
            raise FieldError(f"{where}: mask of {name!r}", "a bool tensor", got)
        if kind := odd_kind(mask):
            raise FieldError(f"{where}: mask of {name!r}", "a dense tensor", kind)
    return dict(masks)


def odd_kind(tensor: Tensor) -> str:
    """Return what kind of tensor it is where it is not a dense one with values."""
    if tensor.is_nested:
        return "a nested one"
    if tensor.layout != torch.strided:
        return f"a sparse one ({tensor.layout})"
    return "one on the meta device" if tensor.is_meta else ""


def _ratio(both: int, either: int) -> float:
    return both / either if either else 1.0
