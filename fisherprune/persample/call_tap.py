"""Runs the calls in which watched parameters, or what is computed from them, take part.

Where they meet samples, a call runs so that its backward pass reports what its gradient
is made of; the others run as they are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fisherprune.persample.layers  # noqa: F401  registers the kinds of layers
from fisherprune.errors import FisherpruneError
from fisherprune.persample.alone import Records
from fisherprune.persample.arguments import (
    Arguments,
    are_alike,
    tensors_in,
    with_tensors,
    without_tensors,
)
from fisherprune.persample.backward import TappedCall, TappedLayer, UnwatchedLayer
from fisherprune.persample.calls import MARK, Key, Rows, Tracking, is_irregular
from fisherprune.persample.copies import has_room, run_with_copies
from fisherprune.persample.finder import Finder, Known
from fisherprune.persample.functions import Function, is_in_place, twin_of
from fisherprune.persample.kept import KeptLayers
from fisherprune.persample.layout import Layout, LayoutError, Scattered
from fisherprune.persample.meeting import (
    RULES,
    Meeting,
    autocast_of,
    multiplied_out,
)
from fisherprune.persample.registry import CALLS, LayerCall, SamplesMixError
from fisherprune.persample.rows import SEEMS_OTHER
from fisherprune.persample.scattered import rule_for_rows
from fisherprune.shards import any_shard

SPLIT = "what is computed from it is split over ranks"


class CallTap(Tracking):
    """Runs calls while it is active; sees where their parameters come from and go.

    Args:
        parameters: watched, by name.
        batch: the tensors with the samples first.
        samples: in the batch.
        op: named in errors.
        alone: what a sample by itself was seen to do.
        known: what earlier batches showed of calls.
        kept: layers of earlier batches.
        scattered: parameters whose calls have rows of any samples, by name; None: no
            call may have.

    Attributes:
        ways: the functions that a parameter went into, by its name.
        refused: why the gradient of a parameter can't be known, by its name.
    """

    replaces = True
    """Whether tapped gradients, and a layer's, come in the place of autograd's."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: Sequence[Tensor],
        samples: int,
        op: str,
        alone: Records | None = None,
        known: dict[Key, Known] | None = None,
        kept: KeptLayers | None = None,
        scattered: Collection[str] | None = None,
    ) -> None:
        super().__init__(parameters, batch)
        self.finds_rows, self.scattered = scattered is not None, set(scattered or ())
        self.parameters = parameters
        self.samples = samples
        self.op = op
        self.known = {} if known is None else known
        self.kept = kept or KeptLayers()
        self.kept.begin()
        self.finder = Finder(self, samples, alone, self.known)
        self.ways: dict[str, set[str]] = defaultdict(set)
        self.refused: dict[str, str] = {}
        self.made = set[Key]()  # calls that give what is shared an axis of samples
        self.hidden = ""  # a parameter that was used without autograd
        self.met: Counter[int] = Counter()  # calls by the id of a shared tensor
        self.versions: dict[int, int] = {}
        # An input of every tapped call, so that autograd runs through all of them.
        self.anchor = torch.zeros((), requires_grad=True)

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
        if func not in CALLS:
            return func(*args, **kwargs)
        call = self._sorted_out(func, arguments)
        # Where nothing is watched, the gradients of all parameters are autograd's.
        replaces = self.replaces and not any_shard(tensors)
        if replaces and call and self.keys and not call.reads_input:
            if not any(_is_computed(p) for p in (call.weight, call.bias)):
                return UnwatchedLayer.apply(call.input, call)
        return func(*args, **kwargs)

    def _sorted_out(self, func: Function, arguments: Arguments) -> LayerCall | None:
        """Return what kind of layer is called; None where there is no such kind."""
        args, kwargs = arguments
        if func not in CALLS:
            return None
        try:
            call = CALLS[func](*args, **kwargs)
            return call and self.kept.of(call)
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
            if (output := self._again(func, arguments, tensors, key)) is not None:
                return output
            scattered = self.scattered and self.scattered & self.roots_of(shared)
            if scattered and self.samples > 1:
                raise LayoutError(SEEMS_OTHER)
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
            output = self._scattered(func, arguments, tensors, key)
            if output is not None:
                return output
            for name in self.roots_of(shared):
                self.refused.setdefault(name, f"{func.__name__}: {error}")
            return func(*args, **kwargs)
        if any_shard(shared):
            if any(t.requires_grad for t in tensors_in(output)):
                for name in self.roots_of(shared):
                    self.refused.setdefault(name, f"{func.__name__}: {SPLIT}")
            return output
        self.note_computed(output, key, shared)
        return output

    def _again(
        self, func: Function, arguments: Arguments, tensors: list[Tensor], key: Key
    ) -> Tensor | None:
        """Run a layer as in an earlier batch; None where more must be looked at."""
        known = self.known.get(key)
        if known is None or known.input is None or self.scattered:
            return None
        layout, input = known.input, tensors[0]
        if layout.samples != self.samples or not layout.fits(input):
            return None
        if input.__dict__.get(MARK) != (self._run, Rows.PLAIN) or is_irregular(input):
            return None
        call = self._sorted_out(func, arguments)
        if call is None or call.input is not input or not self._fits(call, tensors):
            return None
        output = self._layer(func, call, layout, arguments, tensors)
        self.mark(output)
        return output

    def _tapped(
        self, func: Function, arguments: Arguments, tensors: list[Tensor], key: Key
    ) -> Any:
        """Run a call in which shared tensors meet samples."""
        is_split = any_shard(tensors)
        if is_in_place(func.__name__) or func is Tensor.__setitem__:
            twin = twin_of(func)
            if twin is None or is_split or id(tensors[0]) in self.keys:
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
                if is_split:
                    return self._met(func, arguments, tensors, key, is_layer=True)
                known = self.known[key]
                if self.samples > 1 and call.input is tensors[0] and not known.input:
                    if [each for each in known.layouts if each] == [layout]:
                        self.known[key] = replace(known, input=layout)
                return self._layer(func, call, layout, arguments, tensors)
        return self._met(func, arguments, tensors, key)

    def _fits(self, call: LayerCall, tensors: list[Tensor]) -> bool:
        """Return whether the rule for a kind of layer covers this call of it."""
        weight, bias, dims = call.weight, call.bias, call.input.dim()
        if dims < 2 or dims != (call.dims or dims):
            return False
        if weight is not None and weight.dim() != (call.weight_dims or weight.dim()):
            return False
        for tensor in tensors:
            operand = tensor is weight or tensor is bias
            if tensor.dtype.is_complex or id(tensor) in self.keys and not operand:
                return False
        return True

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
        shared = tuple([id(p) if id(p) in self.keys else None for p in operands])
        computed = [
            operand if not own and _is_computed(operand) else None
            for own, operand in zip(shared, operands, strict=True)
        ]
        output = TappedLayer.apply(
            call.input, self.anchor, *computed, call, shared, layout, self
        )
        if not layout.fits(output):
            raise LayoutError("its result has not the samples where its input has")
        if call.is_read:
            self.finder.note_alike(layout, output, is_read=False)
        for operand, own in zip(operands, shared, strict=True):
            if operand is not None and own:
                self._note(operand, func.__name__)
        return output

    def _met(
        self,
        func: Function,
        arguments: Arguments,
        tensors: list[Tensor],
        key: Key,
        is_layer: bool = False,
    ) -> Tensor:
        """Run a call of any function, by its rule or by its own gradient."""
        rule = RULES.get(func) or multiplied_out
        own = {i: id(t) for i, t in enumerate(tensors) if id(t) in self.keys}
        has_rule = is_layer or rule is not multiplied_out
        for i in own:
            self._note(tensors[i], func.__name__ if has_rule else "vmap")
        if not has_rule and not any_shard(tensors):
            output = self._with_copies(func, arguments, tensors, key)
            if output is not None:
                self.mark(output)
                return output
        cut = [self.cut(t) if i in own else t for i, t in enumerate(tensors)]
        args, kwargs = with_tensors(arguments, iter(cut))
        output = func(*args, **kwargs)
        if any_shard(tensors):
            from fisherprune.persample.split import added_up, split_rule

            output, rule = added_up(output), split_rule(func, is_layer)
        meeting = self._meeting(func, self.finder.find_output(key, output), own)
        output = TappedCall.apply(
            output, self.anchor, meeting, rule, own, self, *(t.detach() for t in cut)
        )
        self.mark(output)
        return output

    def _with_copies(
        self, func: Function, arguments: Arguments, tensors: list[Tensor], key: Key
    ) -> Tensor | None:
        """Run a call that has no rule for each sample; None where that can't be."""
        own = [i for i, t in enumerate(tensors) if id(t) in self.keys]
        few = has_room(self.samples, (tensors[i] for i in own))
        known = self.known[key]
        if self.samples == 1 or not (self.replaces and few and known.copies):
            return None
        if known.output is None:
            with torch.no_grad():
                known = self._output_known(func, arguments, tensors, key)
        output = run_with_copies(self._meeting(func, known, own), tensors, self)
        if output is None:
            self.known[key] = replace(known, copies=False)
        return output

    def _output_known(
        self, func: Function, arguments: Arguments, tensors: list[Tensor], key: Key
    ) -> Known:
        """Find the samples in what a call returns: two samples show it, mostly."""
        known = self.known[key]
        is_last = self.finder.alone is not None and self.finder.alone.sample == -1
        if self.samples > 2 and is_last and are_alike(arguments, known.arguments):
            two = [
                layout.of_two(tensor) if layout else tensor
                for layout, tensor in zip(known.layouts, tensors, strict=True)
            ]
            args, kwargs = with_tensors(arguments, iter(two))
            try:
                return self.finder.find_output(key, func(*args, **kwargs), 2)
            except Exception:  # it may need as many samples as there are
                pass
        args, kwargs = arguments
        return self.finder.find_output(key, func(*args, **kwargs))

    def _meeting(self, func: Function, known: Known, own: Iterable[int]) -> Meeting:
        assert known.output
        places = known.layouts, tuple(own), known.output
        return Meeting(func, known.arguments, *places, autocast_of())

    def _scattered(
        self, func: Function, arguments: Arguments, tensors: list[Tensor], key: Key
    ) -> Tensor | None:
        """Run a call whose rows may be of any samples; None where no rule is for it."""
        unfit = any_shard(tensors) or any(map(is_irregular, tensors))
        if not self.finds_rows or self.samples == 1 or unfit:
            return None
        own = {i: id(t) for i, t in enumerate(tensors) if id(t) in self.keys}
        found = rule_for_rows(func, arguments, tensors, own)
        if found is None:
            return self._part_of_shared(func, arguments, tensors, key)
        features, rule = found
        for i in own:
            self._note(tensors[i], func.__name__)
        cut = [self.cut(t) if i in own else t for i, t in enumerate(tensors)]
        args, kwargs = with_tensors(arguments, iter(cut))
        rows = Scattered(self.samples, features)
        nowhere = tuple(None for _ in tensors), tuple(own), Layout(0, self.samples)
        given = without_tensors(arguments), *nowhere, autocast_of()
        meeting = Meeting(func, *given, rows)
        self.moved = True  # so gradients are asked
        return TappedCall.apply(
            *(func(*args, **kwargs), self.anchor, meeting, rule, own, self),
            *(t.detach() for t in cut),
        )

    def _part_of_shared(
        self, func: Function, arguments: Arguments, tensors: list[Tensor], key: Key
    ) -> Tensor | None:
        """Return a part that values choose, an expert's weight say; None of others.

        A view has the values of the shared tensor alone, whoever chose it.
        """
        if func is not Tensor.__getitem__ or id(tensors[0]) not in self.keys:
            return None
        # What all samples were reduced to is no choice of rows: then they mix.
        if self.rows_of(tensors) != Rows.UNEVEN and any(map(self.is_marked, tensors)):
            return None
        args, kwargs = arguments
        part = func(*args, **kwargs)
        if not part._is_view():
            return None
        self.note_computed(part, key, tensors[:1])
        return part

    def cut(self, shared: Tensor) -> Tensor:
        """Return what a tapped call reads in place of a shared tensor."""
        return shared.detach()

    def _note(self, shared: Tensor, way: str) -> None:
        self.met[id(shared)] += 1
        self.versions.setdefault(id(shared), shared._version)
        for name in self.roots[id(shared)]:
            self.ways[name].add(way)


def _is_computed(operand: Tensor | None) -> bool:
    """Return whether autograd has to go on from it to what it comes from."""
    return operand is not None and not operand.is_leaf
