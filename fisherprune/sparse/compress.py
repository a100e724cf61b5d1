"""From masked dense models to models that execute the kept weights alone, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from fisherprune.errors import FieldError, FisherpruneError, FisherpruneWarning, shown
from fisherprune.masks.apply import warn_of_collapse
from fisherprune.masks.checks import checked_masks
from fisherprune.masks.hold import Hold, lasting_holds
from fisherprune.masks.masks import Masks
from fisherprune.modules import named_modules
from fisherprune.ops.dense import dense_weight
from fisherprune.parameters import checked_model, fitted_names, plain_parameters
from fisherprune.sparse.base import SparseLayer
from fisherprune.sparse.choose import choose
from fisherprune.sparse.fold import unfold_sums
from fisherprune.sparse.fuse import fuse_relu, unfuse
from fisherprune.sparse.optimizers import Conversion, Replacement, sparse_layers
from fisherprune.sparse.plan import Plan, replace_modules
from fisherprune.sparse.replace import replaced


def compress(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    dense_above: float | None = None,
    fold: bool | None = None,
    fuse: bool = True,
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """Replace masked layers by ones that hold and execute the kept weights alone.

    Weights of ``Conv1d``, ``Conv2d`` and ``Linear`` that have a mask become
    ``SparseConv1d``, ``SparseConv2d`` and ``SparseLinear``: parameters ``values`` of
    the kept entries, with a pattern that does not change. Outputs and gradients are
    those of the masked dense model up to rounding, and so is training, at the price of
    the kept weights; also the optimizer keeps nothing of pruned weights.

    Other layers stay dense: transposed and three-dimensional convolutions, those that
    pad otherwise than with zeros, subclasses, layers without a mask or with too dense a
    one. Of these the masks are set and held (``Masks.hold``) by the model given; as any
    hold, it is not copied with the model: ``hold_dense`` holds them anew.

    Folding prepares a model in evaluation mode for inference: BatchNorm after a
    convolution, sparse or dense, becomes part of it, a ReLU after a sparse layer, too,
    and a residual is added by the sparse convolution before the sum; max-pooling is
    that of ``replaced``. Where ``torch.fx`` can trace the model, a
    ``torch.fx.GraphModule`` without the calls that are folded is returned, of the same
    layers by the same names. Do not train it further. Where it can't, there is a
    ``FisherpruneWarning``, and nothing is folded.

    The model given is changed in either case; where something is refused, nothing is.
    Make or load an optimizer afterwards, or give it here: one from before, which is not
    given, would train weights that the model has no more, without an error
    (``check_optimizer`` finds that). Wrap the model (``DistributedDataParallel``) and
    compile it afterwards.

    Args:
        model: any model that has layers inside.
        masks: bool tensors by parameter name, True = kept; such as ``Masks``.
        dense_above: the density above which a layer stays dense, from 0 to 1; None
            decides by ``sparse.cost.pays``, for float32 or, under autocast, for
            bfloat16: call it in the context that the model will run in.
        fold: whether to fold; None folds where the model is in evaluation mode and no
            ``optimizer`` is given.
        fuse: whether a model in training mode gets the modules of ``replaced``, and
            runs BatchNorm, the residual and the ReLU behind it as one op
            (``fuse_relu``), where ``torch.fx`` can trace it.
        optimizer: of torch.optim over all masked weights that are trained; its momenta
            of kept weights go on with their ``values``, in the same groups.

    Returns:
        The model, or a ``torch.fx.GraphModule`` of its layers if something was folded.

    Raises:
        FisherpruneError: where the masks do not fit the model; a masked weight is tied,
            computed from others (parametrized), quantized, lazy, no floating-point
            tensor, or in shards; the model is compressed already, wrapped for several
            processes, or one layer itself; the optimizer does not train a weight or
            remembers what can't be divided among weights; a model in training mode, or
            one with an optimizer, is to be folded.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
        >>> masks = {"0.weight": torch.rand(50, 100) < 0.1}
        >>> x = torch.randn(8, 100)
        >>> model = compress(model, masks)
        >>> type(model[0]).__name__, type(model[2]).__name__
        ('SparseLinear', 'Linear')
        >>> model[0].values.numel() == masks["0.weight"].sum()
        tensor(True)
        >>> model(x).sum().backward()
        >>> model[0].values.grad.shape == model[0].values.shape
        True
    """
    _check_fold(model, fold, optimizer)
    fold = False if fold is None and optimizer is not None else fold
    plan = Plan(model, choose(model, masks, dense_above), fold)
    conversion = Conversion(optimizer, plan.replacements(), "compress")
    result = carry_out(plan, conversion, optimizer)
    if fuse and model.training and plan.choice.layers:
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            fuse_relu(model)
        replaced(model, layers=True)
    return result


def carry_out(
    plan: Plan, conversion: Conversion, optimizer: Optimizer | None
) -> nn.Module:
    """Do what was planned; nothing is refused from here on."""
    conversion.carry_out()
    olds = [r.old for r in plan.replacements()]
    for hold in lasting_holds():
        hold.release(olds)
    plan.replace()
    layers = {c.name: c.mask for c in plan.choice.layers}
    if not layers:
        warnings.warn(
            "compress: no layer becomes sparse: the masks are of other layers, or keep "
            "too much to pay (dense_above=1.0 makes all sparse that can be)",
            FisherpruneWarning,
            stacklevel=3,
        )
    warn_of_collapse(layers, stacklevel=3)
    if plan.choice.dense and plan.folding is None:  # the model may be trained on
        rest = Masks(plan.choice.dense)
        if not _is_held(plan.model, rest):
            rest.hold(plan.model, optimizer)
    return plan.result()


def _is_held(model: nn.Module, masks: Masks) -> bool:
    """Return whether holds keep these weights at zero already."""
    named = plain_parameters(model)
    names = fitted_names(masks, named) or {}
    return all(
        any(hold.keeps(named[names[n]], ~mask) for hold in lasting_holds())
        for n, mask in masks.items()
    )


def _check_fold(
    model: nn.Module, fold: bool | None, optimizer: Optimizer | None
) -> None:
    checked_model(model)
    if fold is not None and not isinstance(fold, bool):
        raise FieldError("compress: fold", "True, False or None", shown(fold))
    if fold and model.training:
        wanted = "False or None for a model in training mode"
        raise FieldError("compress: fold", wanted, "True: call model.eval() first")
    if fold and optimizer is not None:
        raise FieldError("compress: fold", "False or None with an optimizer", "True")


def decompress(model: nn.Module, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Replace the sparse layers of a model by dense ones, with zeros.

    They have the names, kinds and state of before ``compress``. What was folded stays
    so: biases hold BatchNorm, and a layer with a ReLU becomes a Sequential of the layer
    and ``ReLU``. The zeros are not held: ``Masks.hold`` does that, by the masks of
    before, or those of ``SparseLayer.mask``.

    Args:
        model: is changed.
        optimizer: one that trains the ``values``; their momenta go on with the weights,
            zero where nothing was kept.

    Returns:
        The model.

    Raises:
        FisherpruneError: where the model has no sparse layer, or the optimizer does not
            train one or remembers what can't be divided; nothing is changed then.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> mask = torch.tensor([[True, False, False], [False, False, False]])
        >>> model = decompress(compress(model, {"0.weight": mask}))
        >>> model[0].weight.ne(0).tolist() == mask.tolist()
        True
    """
    layers = dict(sparse_layers(checked_model(model)))
    if not layers:
        raise FieldError("decompress: model", "one of sparse layers", "one without")
    if isinstance(model, SparseLayer):
        wanted = "a module that has its layers inside"
        raise FieldError("decompress: model", wanted, f"a {type(model).__name__}")
    dense = {layer: layer.to_dense() for layer in layers.values()}
    replacements = [
        Replacement(
            layer.values,
            dense[layer].weight,
            (f"{name}.values", f"{name}.weight"),
            partial(_spread, layer=layer),
        )
        for name, layer in layers.items()
    ]
    Conversion(optimizer, replacements, "decompress").carry_out()
    new: dict[nn.Module, nn.Module] = {
        layer: nn.Sequential(dense[layer], nn.ReLU()) if layer.relu else dense[layer]
        for layer in layers.values()
    }
    unfuse(model)
    unfold_sums(model)
    replace_modules(model, new)
    return model


def _spread(values: Tensor, layer: SparseLayer) -> Tensor:
    return dense_weight(values, layer.rows, layer.columns, layer.shape)


def hold_dense(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    optimizer: Optimizer | None = None,
) -> Hold | None:
    """Hold the masks of the layers that have stayed dense in a compressed model.

    ``compress`` does so itself. A copy of the model, or one that was pickled, is not
    held: no copy is.

    Args:
        model: a model of ``compress``, not folded.
        masks: that it was compressed by.
        optimizer: as in ``Masks.hold``.

    Returns:
        The hold; None where no masked layer has stayed dense.

    Raises:
        FisherpruneError: where the masks do not fit the model, or are others than its
            sparse layers have.

    Example:
        >>> import copy, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.Linear(5, 2))
        >>> masks = {"0.weight": torch.eye(5, 9) > 0, "1.weight": torch.eye(2, 5) < 1}
        >>> model = copy.deepcopy(compress(model, masks))
        >>> hold = hold_dense(model, masks)
        >>> list(hold.masks)
        ['1.weight']
    """
    masks = checked_masks(masks, "hold_dense")
    layers = dict(_named_layers(checked_model(model)))
    owns = [*plain_parameters(model), *layers]
    names = fitted_names(masks, owns) or {}
    rest = {}
    for name, mask in masks.items():
        layer = layers.get(names.get(name, name))
        if layer is None:
            rest[name] = mask
        elif not _same(layer.mask(), mask):
            raise FisherpruneError(
                f"hold_dense: the mask of {name!r} must be that which the model was "
                "compressed by, got another"
            )
    return Masks(rest).hold(model, optimizer) if rest else None


def _named_layers(model: nn.Module) -> Iterable[tuple[str, SparseLayer]]:
    """Yield the sparse layers by the names that their weights had."""
    for name, module in named_modules(model):
        if isinstance(module, SparseLayer):
            yield f"{name}.weight", module


def _same(mask: Tensor, other: Tensor) -> bool:
    return mask.shape == other.shape and bool((mask == other.to(mask.device)).all())
