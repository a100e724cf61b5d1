"""What the channels between layers carry: constants, or what depends on the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fisherprune.errors import FisherpruneError, shown
from fisherprune.sparse.channels import channels_of, is_passing, is_reader
from fisherprune.statistics.structure import map_tensors, tensors_in
from fisherprune.streams import stream

NAN = float("nan")


@dataclass
class Reads:
    """What a layer reads, one entry for each input channel.

    Attributes:
        constant: bool, whether it is a constant, the same at all positions.
        value: float64, the constant, or anything.
    """

    constant: Tensor
    value: Tensor


class Probe:
    """Runs a model with hooks. The model is in eval mode and in float64.

    Args:
        model: is left as it is.
        example: a tensor, a tuple of arguments or a dictionary of keyword arguments.
    """

    def __init__(self, model: nn.Module, example: object) -> None:
        self.model = model
        self.example = map_tensors(_doubled, example)
        noise = stream(0, "shrink")
        self.other = map_tensors(lambda t: _with_noise(t, noise), self.example)

    def run(self, example: object | None = None, model: nn.Module | None = None) -> Any:
        """Return what the model, or another, computes of an example.

        Raises:
            FisherpruneError: where it raises anything.
        """
        given: Any = map_tensors(
            lambda t: t.clone(), self.example if example is None else example
        )
        args: tuple[Any, ...] = given if isinstance(given, tuple) else (given,)
        kwargs: dict[str, Any] = {}
        if isinstance(given, Mapping):
            args, kwargs = (), dict(given)
        which = "the model" if model is None else "the smaller model"
        try:
            return (self.model if model is None else model)(*args, **kwargs)
        except Exception as error:
            got = f"{type(error).__name__}: {shown(str(error))}"
            wanted = f"shrink: {which} must run on example_inputs in float64"
            raise FisherpruneError(f"{wanted}, got {got}") from error

    @torch.no_grad()
    def outputs(self, model: nn.Module | None = None) -> list[Tensor]:
        """Return all tensors that come of the example, and of the same with noise."""
        both = [self.run(each, model) for each in (self.example, self.other)]
        return tensors_in(both)

    @torch.no_grad()
    def reads(self, pruned: Mapping[nn.Module, Tensor]) -> dict[nn.Module, Reads]:
        """Return what each Linear module and convolution reads, by channel.

        A channel is constant where it is the same in all samples, at all positions, in
        all calls, on the example and with noise added to it; and where it stays finite
        when all inputs and all outputs of layers that are not pruned are NaN.

        Args:
            pruned: the output channels of layers that are pruned.
        """
        low, high = dict[nn.Module, Tensor](), dict[nn.Module, Tensor]()

        def record(module: nn.Module, x: Tensor) -> None:
            entries = _rows(module, x)
            low[module] = entries.amin(1).minimum(low.get(module, entries[:, 0]))
            high[module] = entries.amax(1).maximum(high.get(module, entries[:, 0]))

        with self._reading(record):
            self.run()
            self.run(self.other)
            with self._without_inputs(pruned):
                nothing = map_tensors(lambda t: t * NAN if _real(t) else t, self.other)
                self.run(nothing)
        found = {}
        for module, value in low.items():
            spread = high[module] - value  # NaN where one was
            found[module] = Reads(spread <= 1e-10 * value.abs().clamp_min(1), value)
        return found

    def _without_inputs(self, pruned: Mapping[nn.Module, Tensor]) -> ExitStack:
        """Let layers return NaN, where they are pruned their bias."""

        def replaced(module: nn.Module, _: object, out: Any) -> Any:
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                return out * NAN
            out = out.clone()
            channels, gone = channels_of(module, out), pruned.get(module)
            if is_reader(module):
                channels.fill_(NAN)
            if gone is not None:
                bias: Any = module.bias
                values = (
                    torch.zeros_like(gone, dtype=out.dtype) if bias is None else bias
                )
                shape = (-1, *[1] * (channels.dim() - 1))
                channels[gone] = values[gone].view(shape)
            return out

        kinds = nn.Embedding | nn.EmbeddingBag
        return _hooked(
            module.register_forward_hook(replaced)
            for module in self.model.modules()
            if is_reader(module) or module in pruned or isinstance(module, kinds)
        )

    @contextmanager
    def _reading(self, record: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict) -> None:
            record(module, args[0] if args else kwargs["input"])

        with _hooked(
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module in self.model.modules()
            if is_reader(module)
        ):
            yield

    @torch.no_grad()
    def misled(
        self,
        sources: Mapping[nn.Module, set[int]],
        claims: Mapping[nn.Module, set[int]],
    ) -> str:
        """Say where channels go that they are not said to go to; "" if nowhere.

        Args:
            sources: output channels of layers.
            claims: the input channels of layers that they should reach, no others, in
                each call.
        """
        odd = list[nn.Module]()

        def arrive(module: nn.Module, args: tuple[Any, ...], kwargs: dict) -> Any:
            x = args[0] if args else kwargs["input"]
            there = _rows(module, x).isnan().any(1).nonzero().flatten()
            if set(there.tolist()) != claims.get(module, set()):
                odd.append(module)
            if not is_reader(module):
                return args, kwargs
            x = x.masked_fill(x.isnan(), 0.0)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})

        def leave(module: nn.Module, _: object, out: Tensor) -> Tensor:
            out = out.clone()
            channels_of(module, out)[sorted(sources[module])] = NAN
            return out

        layers = [m for m in self.model.modules() if is_reader(m) or is_passing(m)]
        pre = (m.register_forward_pre_hook(arrive, with_kwargs=True) for m in layers)
        with _hooked(pre), _hooked(m.register_forward_hook(leave) for m in sources):
            out = tensors_in(self.run())
        if any(bool(t.isnan().any()) for t in out if _real(t)):
            return "they are outputs of the model, or reach these past all layers"
        names = {module: name for name, module in self.model.named_modules()}
        where = f"on the way to {names[odd[0]]!r}" if odd else ""
        return f"Torch-Pruning can't follow them {where}" if odd else ""


def _hooked(handles: Iterator[RemovableHandle]) -> ExitStack:
    """Remove hooks at the end."""
    stack = ExitStack()
    for handle in handles:
        stack.callback(handle.remove)
    return stack


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's input, a row for each channel: [C, entries]."""
    channels = channels_of(module, x)
    return channels.reshape(len(channels), -1)


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if _real(tensor) else tensor.detach()


def _with_noise(tensor: Tensor, noise: torch.Generator) -> Tensor:
    if not _real(tensor):
        return tensor
    added = torch.randn(tensor.shape, generator=noise, dtype=tensor.dtype)
    return tensor + added.to(tensor.device)
