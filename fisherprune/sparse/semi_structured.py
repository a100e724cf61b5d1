"""Weights of which two of each four are pruned, for the sparse tensor cores of GPUs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError, FisherpruneWarning
from fisherprune.masks.apply import pruned_weights
from fisherprune.masks.checks import checked_masks
from fisherprune.masks.masks import Masks
from fisherprune.parameters import check_shapes_known, checked_model, plain_parameters
from fisherprune.shards import any_shard

DTYPES = (torch.float16, torch.bfloat16)
"""Of weights that become semi-structured."""
CAPABILITY = (8, 0)
"""The lowest compute capability with sparse tensor cores."""
SHOWN = 8


def semi_structured(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Run Linear layers with 2:4 masks on the sparse tensor cores of a GPU.

    A mask is 2:4 where it keeps at most 2 of each 4 consecutive inputs of an output, as
    those of ``structure="2:4"`` do:

        sum of mask[o, 4 i : 4 i + 4] <= 2   for all o, i

    Weights with such masks become ``torch.sparse.to_sparse_semi_structured``: half of
    the entries and two bits for the place of each; so a product takes half the
    arithmetic. For inference alone: they have no gradients. Outputs are those of the
    masked model, up to the rounding of another order of summation.

    Layers that can't become so stay dense, masked; one ``FisherpruneWarning`` names
    them, with the reason: no ``nn.Linear`` itself, another pattern, another dtype than
    float16 or bfloat16, a weight that is tied or computed, or what torch requires of
    shapes (multiples of 16, 32 or 64, by its version and backend).

    Args:
        model: in evaluation mode, on GPUs; is changed.
        masks: bool tensors by parameter name, True = kept, such as ``Masks``.

    Returns:
        The model.

    Raises:
        FisherpruneError: where a masked weight is on no CUDA device of compute
            capability 8.0 or higher, the masks do not fit, the model is in training
            mode, in shards or lazy; nothing is changed then.

    References:
        Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv
        2104.08378.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 64).eval()
        >>> masks = {"0.weight": torch.tensor([True, False]).repeat(64, 32)}
        >>> model = torch.nn.Sequential(layer).eval()
        >>> semi_structured(model, masks)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        fisherprune.errors.FisherpruneError: semi_structured: ... got cpu: elsewhere ...
    """
    check_shapes_known(checked_model(model))
    masks = checked_masks(masks, "semi_structured")
    if model.training:
        wanted = "in evaluation mode, for inference alone: call model.eval() first"
        raise FieldError("semi_structured: model", wanted, "one in training mode")
    if any_shard(model.parameters()):
        raise FieldError("semi_structured: parameters", "whole", "some in shards")
    pairs = pruned_weights(masks, model)
    for name, (weight, _) in pairs.items():
        _check_hardware(name, weight.device)
    Masks(masks).apply_(model)
    owners = _owners(model)
    stay = {}
    for name, (weight, pruned) in pairs.items():
        if weight.dim() < 2:  # of biases and scales
            continue
        why = _why_dense(weight, ~pruned, owners[id(weight)])
        why = why or _convert(owners[id(weight)][0][0], weight)
        if why:
            stay[name] = why
    _warn(stay)
    return model


def _check_hardware(name: str, device: torch.device) -> None:
    got = lacks_sparse_cores(device)
    if got:
        raise FisherpruneError(
            f"semi_structured: {name!r} must be on a CUDA device of compute capability "
            f"8.0 or higher, got {got}: elsewhere run the masked dense model, or on a "
            "CPU sparse.compress"
        )


def lacks_sparse_cores(device: torch.device) -> str:
    """Say what a device is where it has no sparse tensor cores, else nothing.

    Example:
        >>> lacks_sparse_cores(torch.device("cpu"))
        'cpu'
    """
    if device.type != "cuda":
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= CAPABILITY else f"{device} of {major}.{minor}"


def is_two_of_four(mask: Tensor) -> bool:
    """Return whether a mask keeps at most 2 of each 4 consecutive inputs.

    Args:
        mask: bool ``[out, in]``, True = kept.

    Example:
        >>> is_two_of_four(torch.tensor([[True, True, False, False]]))
        True
        >>> is_two_of_four(torch.tensor([[False, True, True, True]]))
        False
    """
    if mask.dim() != 2 or mask.shape[1] % 4:
        return False
    return bool((mask.reshape(len(mask), -1, 4).sum(2) <= 2).all())


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the modules that have a parameter, and what they call it, by its id."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {
        id(p): [] for p in plain_parameters(model).values()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((module, name))
    return owners


def _why_dense(
    weight: Tensor, mask: Tensor, owners: list[tuple[nn.Module, str]]
) -> str:
    """Say why a layer stays dense; "" where it need not."""
    module, name = owners[0]
    if len(owners) > 1:
        return "it is tied"
    if type(module) is not nn.Linear or name != "weight":
        return f"it is the {name} of a {type(module).__name__}"
    if not is_two_of_four(mask):
        return "its mask keeps more than 2 of some 4"
    if weight.dtype not in DTYPES:
        kind = str(weight.dtype).removeprefix("torch.")
        return f"it is of {kind}, neither float16 nor bfloat16"
    return ""


def _convert(module: nn.Module, weight: Tensor) -> str:
    """Give a layer a semi-structured weight, or say what torch has against it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructured")
            sparse = torch.sparse.to_sparse_semi_structured(
                weight.detach().contiguous()
            )
    except RuntimeError as error:
        return " ".join(str(error).split())
    module.weight = nn.Parameter(sparse, requires_grad=False)
    return ""


def _warn(stay: Mapping[str, str]) -> None:
    """Name the layers that stay dense."""
    if stay:
        some = [f"{name!r} ({why})" for name, why in stay.items()]
        more = "; ..." if len(some) > SHOWN else ""
        warnings.warn(
            f"semi_structured: {len(stay)} masked parameters stay dense: "
            f"{'; '.join(some[:SHOWN])}{more}",
            FisherpruneWarning,
            stacklevel=3,
        )
