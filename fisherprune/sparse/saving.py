"""Saving compressed models, and loading them into dense ones."""

from __future__ import annotations

import os

from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.modules import unwrapped
from fisherprune.parameters import checked_model
from fisherprune.sparse.base import SparseLayer
from fisherprune.sparse.choose import choose
from fisherprune.sparse.compress import carry_out
from fisherprune.sparse.files import SparseFile, read_file, write_file
from fisherprune.sparse.optimizers import Conversion
from fisherprune.sparse.packing import pack_places
from fisherprune.sparse.plan import Plan

PATTERN = ("rows", "columns")


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a compressed model's state to a safetensors file, whole or not at all.

    Of sparse layers it holds the kept values, four bytes each in float32, and their
    places, one byte each at most densities and two at very low ones; everything else as
    it is in ``state_dict()``. The same model makes the same file.

    Args:
        model: of ``compress``, folded or not.
        path: of the file.

    Raises:
        FisherpruneError: where the model has no sparse layer, its state has something
            else than tensors, or ``path`` is no path.
        OSError: where it can't be written.

    Example:
        >>> import tempfile, torch
        >>> from fisherprune.sparse import compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(300, 100))
        >>> model = compress(model, {"0.weight": torch.rand(100, 300) < 0.05})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/sparse.safetensors")
        ...     other = torch.nn.Sequential(torch.nn.Linear(300, 100))
        ...     other = load(other, f"{folder}/sparse.safetensors")
        >>> torch.equal(other[0].weight, model[0].weight)
        True
    """
    model = unwrapped(checked_model(model))
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseLayer)
    }
    if not layers:
        raise FieldError("save: model", "one of sparse layers", "one without")
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise FieldError(f"save: {name!r}", "a tensor", shown(value))
        tensors[name] = value
    for name, layer in layers.items():
        for part in PATTERN:
            del tensors[f"{name}.{part}"]
        tensors[f"{name}.places"] = pack_places(layer.places())
    about = {n: {"shape": m.shape, "relu": m.relu} for n, m in layers.items()}
    write_file(path, tensors, about)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Make a model sparse as a file says, and load its state.

    Args:
        model: a dense model of the architecture that was compressed; is changed, and
            in evaluation mode afterwards if the file's was folded.
        path: of a file of ``save``.

    Returns:
        What ``compress`` returned when the file's model was made: the model, or a
        ``torch.fx.GraphModule`` if something was folded.

    Raises:
        FisherpruneError: where the file is missing, damaged or another one, or its
            model has other layers or shapes; the model is as it was then.

    Example:
        See ``save``.
    """
    file, outer = read_file(path), checked_model(model)
    model = unwrapped(outer)
    _check_layers(model, file)
    choice = choose(model, _own_masks(model, file), dense_above=1.0)
    if choice.dense:
        some = next(iter(choice.dense))
        raise _unfit(file, f"{some!r} of the model is of no layer that can be sparse")
    training = [(module, module.training) for module in model.modules()]
    fold = bool(file.relus) or _lacks_some(model, file)
    try:
        if fold:
            model.eval()
        plan = Plan(model, choice, fold)
        _check_plan(plan, file)
    except BaseException:
        for module, was in training:
            module.training = was
        raise
    result = carry_out(plan, Conversion(None, [], "load"), None)
    state = result.state_dict()
    patterns = {
        f"{name}.{part}": state[f"{name}.{part}"]
        for name in file.places
        for part in PATTERN
    }
    result.load_state_dict(file.tensors | patterns)
    return outer if result is model else result


def _check_layers(model: nn.Module, file: SparseFile) -> None:
    """Refuse a file of layers that the model has not."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, shape in file.shapes.items():
        weight = getattr(modules.get(name), "_parameters", {}).get("weight")
        if weight is None:
            raise _unfit(file, f"the model has no {name!r} with a weight")
        if tuple(weight.shape) != shape:
            sizes = f"shape {list(shape)} in the file and {list(weight.shape)}"
            raise _unfit(file, f"the weight of {name!r} has {sizes} in the model")


def _own_masks(model: nn.Module, file: SparseFile) -> dict[str, Tensor]:
    """Return the file's masks; a layer of several names has one of the first."""
    own = dict(model.named_parameters())
    return {name: mask for name, mask in file.masks().items() if name in own}


def _lacks_some(model: nn.Module, file: SparseFile) -> bool:
    """Return whether dense entries of the model's state are not in the file."""
    sparse = {f"{name}.weight" for name in file.shapes}
    return any(
        name not in file.tensors and name not in sparse for name in model.state_dict()
    )


def _check_plan(plan: Plan, file: SparseFile) -> None:
    """Compare what the model would be with what the file holds."""
    wanted = {name: tuple(t.shape) for name, t in plan.state().items()}
    wanted = {n: s for n, s in wanted.items() if n.rpartition(".")[2] not in PATTERN}
    found = {name: tuple(t.shape) for name, t in file.tensors.items()}
    odd = sorted(wanted.keys() ^ found.keys())
    if odd:
        some = ", ".join(map(repr, odd[:3])) + ", ..." * (len(odd) > 3)
        raise _unfit(file, f"{some} in one of them alone")
    for name, shape in wanted.items():
        if shape != found[name]:
            sizes = f"shape {list(found[name])} in the file and {list(shape)}"
            raise _unfit(file, f"{name!r} has {sizes} in the model")
    relus = plan.relus()
    for name in sorted(relus ^ file.relus):
        raise _unfit(file, f"{name!r} has a ReLU in one of them alone")


def _unfit(file: SparseFile, what: str) -> FisherpruneError:
    return FisherpruneError(f"load: {file.path!r} does not fit the model: {what}")
