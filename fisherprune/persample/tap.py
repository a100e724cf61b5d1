"""Taps the backward pass for per-sample gradients of watched parameters.

While a ``LayerTap`` is active, a call in which watched parameters (or what is computed
from them) meet samples runs so that its backward pass reports a ``Contribution`` in
place of the framework's gradient. The tap sees calls of functions, not modules:
functional use and tied weights are covered, nothing in the model is touched and no hook
is left behind.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

import fisherprune.persample.layers  # noqa: F401  registers the kinds of layers
from fisherprune.errors import FisherpruneError
from fisherprune.persample.alone import Records
from fisherprune.persample.backward import (
    TappedCall,
    TappedLayer,
    UnwatchedLayer,
    passed,
)
from fisherprune.persample.calls import (
    Arguments,
    Function,
    Key,
    Tracking,
    is_in_place,
    twin_of,
    with_tensors,
)
from fisherprune.persample.contributions import Contribution, Gradients
from fisherprune.persample.factors import Factors
from fisherprune.persample.finder import Finder, Known
from fisherprune.persample.joined import joined
from fisherprune.persample.layout import Layout, LayoutError
from fisherprune.persample.meeting import RULES, Meeting, multiplied_out
from fisherprune.persample.pulled import all_of
from fisherprune.persample.registry import CALLS, LayerCall, SamplesMixError
from fisherprune.persample.rows import RowCheck

RECOMPUTING = (
    "activation checkpointing runs layers again untapped, and other hooks on saved "
    "tensors may: they must be switched off for scoring"
)


class OwnGradientsError(Exception):
    """The model takes gradients by itself through calls of these parameters."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self.names = names


class LayerTap(Tracking):
    """Reports the gradients of each parameter, ``report(name, gradients)``.

    Args:
        parameters: the watched parameters by name.
        batch: the tensors of the samples.
        samples: N.
        report: called once per parameter and backward pass: during it where the
            parameter is used once, after it where several uses had to be joined.
        op: named in errors.
        alone: the calls of a sample alone; None where ``known`` has all calls
            of batches of these shapes, or there is one sample.
        known: what was found out about calls, to which this batch's are added.
        balances: whether factors are balanced, for losses that are scaled.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: Sequence[Tensor],
        samples: int,
        report: Callable[[str, Gradients], None],
        op: str,
        alone: Records | None = None,
        known: dict[Key, Known] | None = None,
        balances: bool = False,
    ) -> None:
        super().__init__(parameters, batch)
        self.parameters = parameters
        self.samples = samples
        self.report = report
        self.op = op
        self.balances = balances
        self.known = {} if known is None else known
        self.finder = Finder(self, samples, alone, self.known)
        self.ways: dict[str, set[str]] = defaultdict(set)
        self.refused: dict[str, str] = {}  # why, by name
        self.made = set[Key]()  # calls that give what is shared an axis of samples
        self.hidden = ""  # a parameter that was used without autograd
        self.met: Counter[int] = Counter()  # calls by the id of a shared tensor
        self.versions: dict[int, int] = {}
        self.contributions: dict[int, list[Contribution]] = defaultdict(list)
        self.single: dict[int, str] = {}  # parameters that are used once, by id
        self.check: RowCheck | None = None
        self.running = False  # whether the backward pass is the one of the losses
        # An input of every tapped call, so that autograd runs through all of them.
        self.anchor = torch.zeros((), requires_grad=True)

    replaces = True
    """Whether tapped gradients, and a layer's, come in the place of autograd's."""

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Tap the calls inside; the model's forward pass and its losses belong here.

        Raises:
            FisherpruneError: where activations are to be computed again later.
        """
        try:
            with disable_saved_tensors_hooks(RECOMPUTING), self:
                yield
        except RuntimeError as error:
            if RECOMPUTING not in str(error):
                raise
            raise FisherpruneError(f"{self.op}: {RECOMPUTING}") from None

    def run_other(
        self,
        func: Function,
        arguments: Arguments,
        tensors: list[Tensor],
        shared: list[Tensor],
    ) -> Any:
        """Run a call that no gradient of a watched parameter needs."""
        args, kwargs = arguments
        if shared and any(self.is_marked(t) for t in tensors):
            self.hidden = min(self.roots_of(shared))
        call = self._sorted_out(func, arguments)
        # Where nothing is watched, the gradients of all parameters are autograd's.
        if self.replaces and call and self.keys and not call.reads_input:
            if not any(_is_computed(p) for p in (call.weight, call.bias)):
                return UnwatchedLayer.apply(call.input, call)
        return func(*args, **kwargs)

    def _sorted_out(self, func: Function, arguments: Arguments) -> LayerCall | None:
        """Return what kind of layer is called; None where there is no such kind."""
        args, kwargs = arguments
        if func not in CALLS:
            return None
        try:
            return CALLS[func](*args, **kwargs)
        except SamplesMixError as error:
            # One sample has none to mix with; other inputs are computed from weights.
            if self.samples > 1 and self.is_marked(error.input):
                raise FisherpruneError(f"{self.op}: {error}") from None
            return None
        except FisherpruneError as error:
            raise FisherpruneError(f"{self.op}: {error}") from None

    def run_shared(
        self,
        func: Function,
        arguments: Arguments,
        tensors: list[Tensor],
        shared: list[Tensor],
    ) -> Any:
        """Run a call with shared tensors: tapped where they meet samples."""
        args, kwargs = arguments
        key = self.key_of(func, shared)
        try:
            known = self.finder.find(key, arguments, tensors)
            if any(known.layouts):
                if not any(map(self.is_marked, tensors)):  # as many as samples
                    self.made.add(key)
                output = self._tapped(func, arguments, tensors, key)
                self.mark(output)
                return output
            output = func(*args, **kwargs)
            if self.finder.makes_samples(key, output):
                self.made.add(key)
                return self._met(func, arguments, tensors, key)
        except LayoutError as error:
            for name in self.roots_of(shared):
                self.refused.setdefault(name, f"{func.__name__}: {error}")
            return func(*args, **kwargs)
        self.note_computed(output, key, shared)
        return output

    def _tapped(
        self, func: Function, arguments: Arguments, tensors: list[Tensor], key: Key
    ) -> Any:
        """Run a call in which shared tensors meet samples."""
        if is_in_place(func.__name__) or func is Tensor.__setitem__:
            twin = twin_of(func)
            if twin is None or id(tensors[0]) in self.keys:
                raise LayoutError("it changes a tensor in place")
            before = [tensors[0].clone(), *tensors[1:]]  # what is read may be saved
            arguments = with_tensors(arguments, iter(before))
            return tensors[0].copy_(self._tapped(twin, arguments, before, key))
        call = self._sorted_out(func, arguments)
        layouts = {
            id(t): layout
            for t, layout in zip(tensors, self.known[key].layouts, strict=True)
        }
        if call and self._fits(call, tensors):
            # What a call pads has the samples where they were.
            layout = layouts.get(id(call.input)) or layouts[id(tensors[0])]
            if layout and (call.positions or layout.axis == 0):
                return self._layer(func, call, layout, arguments, tensors)
        return self._met(func, arguments, tensors, key)

    def _fits(self, call: LayerCall, tensors: list[Tensor]) -> bool:
        """Return whether the rule for a kind of layer covers this call of it."""
        operands = [p for p in (call.weight, call.bias) if p is not None]
        known = {id(p) for p in operands}
        return (
            not any(p.is_complex() for p in (call.input, *operands))
            and call.input.dim() == (call.dims or call.input.dim())
            and call.input.dim() >= 2
            and all(id(t) in known for t in tensors if id(t) in self.keys)
            and (
                call.weight is None
                or call.weight.dim() == (call.weight_dims or call.weight.dim())
            )
        )

    def _layer(
        self,
        func: Function,
        call: LayerCall,
        layout: Layout,
        arguments: Arguments,
        tensors: list[Tensor],
    ) -> Tensor:
        """Run a call that a rule for a kind of layer covers."""
        operands = call.weight, call.bias
        shared = tuple(id(p) if id(p) in self.keys else None for p in operands)
        computed = tuple(
            operand if not own and _is_computed(operand) else None
            for own, operand in zip(shared, operands, strict=True)
        )
        output = TappedLayer.apply(
            call.input, self.anchor, *computed, call, shared, layout, self
        )
        if not layout.fits(output):
            raise LayoutError("its result has not the samples where its input has")
        for operand, own in zip(operands, shared, strict=True):
            if operand is not None and own:
                self._note(operand, func.__name__)
        return output

    def _met(
        self, func: Function, arguments: Arguments, tensors: list[Tensor], key: Key
    ) -> Tensor:
        """Run a call of any function, by its rule or by its own gradient."""
        rule = RULES.get(func) or multiplied_out
        own = {i: id(t) for i, t in enumerate(tensors) if id(t) in self.keys}
        for i in own:
            self._note(tensors[i], "vmap" if rule is multiplied_out else func.__name__)
        cut = [self.cut(t) if i in own else t for i, t in enumerate(tensors)]
        args, kwargs = with_tensors(arguments, iter(cut))
        output = func(*args, **kwargs)
        known = self.finder.find_output(key, output)
        assert known.output
        meeting = Meeting(
            func,
            known.arguments,
            known.layouts,
            tuple(own),
            known.output,
            autocast_of(),
        )
        output = TappedCall.apply(
            output, self.anchor, meeting, rule, own, self, *(t.detach() for t in cut)
        )
        self.mark(output)
        return output

    def cut(self, shared: Tensor) -> Tensor:
        """Return what a tapped call reads in place of a shared tensor."""
        return shared.detach()

    def _note(self, shared: Tensor, way: str) -> None:
        self.met[id(shared)] += 1
        self.versions.setdefault(id(shared), shared._version)
        for name in self.roots[id(shared)]:
            self.ways[name].add(way)

    def check_samples(self, result: Tensor) -> None:
        """See where rows are of other samples than they seem to be, as a ``RowCheck``.

        Then their parameters are ``refused``.

        Args:
            result: of the forward pass, samples first.
        """
        self.check = RowCheck(self.samples)
        try:
            for factors in self.check.factors_in_turn():
                each = factors.to(result).view(-1, *(1 for _ in result.shape[1:]))
                self.backward((result * each).sum(), again=True)
        finally:
            self.check = None

    def is_checking(
        self, call: object, layout: Layout, grad: Tensor, shared: Iterable[int]
    ) -> bool:
        """Check a gradient in a backward pass of ``check_samples``.

        Args:
            call: whose output's gradient it is.
            layout: of the gradient.
            grad: of the call's output.
            shared: ids of the shared tensors of the call.
        """
        if self.check and self.check.differs(call, layout.apart(grad)):
            reason = "a row that seems to be of one sample is of another"
            for name in self.names_of(shared):
                self.refused.setdefault(name, reason)
        return self.check is not None

    def names_of(self, shared: Iterable[int]) -> frozenset[str]:
        """Return the parameters that shared tensors come from, by their ids."""
        return frozenset[str]().union(*(self.roots[each] for each in shared))

    @property
    def must_check(self) -> bool:
        """Return whether sizes that were read from values may have made rows uneven."""
        return self.has_read_values and self.finder.has_several_entries

    def check_running(self, shared: int) -> None:
        """Refuse gradients that the model or the loss takes by itself."""
        if not self.running:
            raise OwnGradientsError(self.roots[shared])

    def collect(self, shared: int, contribution: Contribution) -> None:
        """Hand one use's contribution to ``report``, or keep it to join the uses."""
        if self.balances and isinstance(contribution, Factors):
            contribution = contribution.balanced()
        if shared in self.single:
            self.report(self.single[shared], contribution)
        elif self.wants(shared):
            self.contributions[shared].append(contribution)

    def wants(self, shared: int) -> bool:
        """Return whether the gradients of a shared tensor are of use."""
        return any(name not in self.refused for name in self.roots[shared])

    def prepare(self, loss: Tensor) -> None:
        """See which parameters' gradients the tap does not know: ``refused``.

        Raises:
            FisherpruneError: where layers may be computed again in the backward pass.
        """
        way = passed(loss, self)
        outside = [n for n, p in self.parameters.items() if id(p) in way.leaves]
        if self.hidden and way.has_own_functions and self.hidden not in outside:
            raise FisherpruneError(f"{self.op}: {RECOMPUTING}; {self.hidden!r} is used")
        for name in outside:
            self.refused.setdefault(name, "its gradient comes from other calls, too")
        for name in way.kept:
            self.refused.setdefault(name, "what an earlier batch computed is kept")
        for id_, tensor in self.computed.items():
            if self.versions.get(id_, tensor._version) != tensor._version:
                reason = "what is computed from it is changed in place"
                self.refused |= dict.fromkeys(self.roots[id_], reason)
        uses = Counter[str]()
        for id_, count in self.met.items():
            uses.update({name: count for name in self.roots[id_]})
        self.single = {
            id(p): name
            for name, p in self.parameters.items()
            if self.met[id(p)] == uses[name] == 1 and name not in self.refused
        }

    def backward(self, loss: Tensor, *, again: bool = False) -> None:
        """Run the backward pass of ``loss``; nothing receives a ``.grad``.

        Args:
            loss: a scalar.
            again: whether another backward pass through the same calls follows.
        """
        with self.receiving():
            try:
                torch.autograd.grad(
                    loss, [self.anchor], allow_unused=True, retain_graph=again
                )
            except RuntimeError as error:
                if "use_reentrant=True" not in str(error):
                    raise
                raise FisherpruneError(f"{self.op}: {RECOMPUTING}") from None

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Report what the backward pass inside hands over."""
        self.running = True
        try:
            yield
        finally:
            self.running = False
        uses = {id_: joined(few) for id_, few in self.contributions.items()}
        self.contributions.clear()
        for name, parameter in self.parameters.items():
            if name in self.refused or id(parameter) in self.single:
                continue
            computed = [
                (gradients, self.computed[id_])
                for id_, gradients in uses.items()
                if id_ in self.computed and name in self.roots[id_]
            ]
            gradients = all_of(parameter, uses.get(id(parameter)), computed)
            if gradients is not None:
                self.report(name, gradients)


def _is_computed(operand: Tensor | None) -> bool:
    """Return whether autograd has to go on from it to what it comes from."""
    return operand is not None and not operand.is_leaf


def autocast_of() -> tuple[str, torch.dtype] | None:
    """Return the device and dtype of autocast, where it is on."""
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return device, torch.get_autocast_dtype(device)
    return None
