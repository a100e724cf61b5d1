"""Taps the backward pass for per-sample gradients of watched parameters.

While a ``LayerTap`` is active, a call in which watched parameters (or what is computed
from them) meet samples runs so that its backward pass reports a ``Contribution`` in
place of the framework's gradient. The tap sees calls of functions, not modules:
functional use and tied weights are covered, nothing in the model is touched and no hook
is left behind.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from fisherprune.errors import FisherpruneError
from fisherprune.persample.alone import Records
from fisherprune.persample.arguments import tensors_in
from fisherprune.persample.backward import passed
from fisherprune.persample.call_tap import CallTap
from fisherprune.persample.calls import Key
from fisherprune.persample.contributions import Contribution, Gradients
from fisherprune.persample.factors import Blocks, Factors
from fisherprune.persample.finder import Known
from fisherprune.persample.joined import joined
from fisherprune.persample.kept import KeptLayers
from fisherprune.persample.layout import Layout, Scattered
from fisherprune.persample.pulled import all_of
from fisherprune.persample.rows import SEEMS_OTHER, RowCheck
from fisherprune.shards import local

RECOMPUTING = (
    "activation checkpointing runs layers again in the backward pass, and other hooks "
    "on saved tensors may: they must be switched off for scoring"
)

UNSEEN = (
    "an autograd.Function (activation checkpointing is one) uses {!r}, which is not "
    "among its inputs: switch checkpointing off for scoring; give a Function of your "
    "own the parameters that it uses as inputs, and return their gradients"
)


UNTOLD = (
    "a row of %s had no gradient in the first backward pass, which tells whose it is, "
    "but has one now: leave the parameter out, or use labels='given'"
)


@contextmanager
def running_once(op: str) -> Iterator[None]:
    """Run a forward pass of which no part may run again in the backward pass.

    Raises:
        FisherpruneError: where activations are to be computed again later.
    """
    try:
        with disable_saved_tensors_hooks(RECOMPUTING):
            yield
    except RuntimeError as error:
        if RECOMPUTING not in str(error):
            raise
        raise FisherpruneError(f"{op}: {RECOMPUTING}") from None


def recomputes(error: Exception) -> bool:
    """Return whether a backward pass failed for reentrant checkpointing."""
    return "use_reentrant=True" in str(error)


OWN_GRADIENTS = "the model or the loss takes gradients of it by itself"


class OwnGradientsError(Exception):
    """The model takes gradients by itself through calls of these parameters."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self.names = names


def scores_of(result: Tensor) -> Tensor:
    """Return a number for each sample, ``[N]``, of a result with the samples first.

    Not the sums, which may be constant: those of probabilities are.
    """
    if result.dim() == 1:
        return result
    rows = result.flatten(1)
    return rows @ torch.arange(1, rows.shape[1] + 1).square().sin().to(rows)


class LayerTap(CallTap):
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
        kept: layers of earlier batches, which go on.
        scattered: names of parameters whose calls have rows of any samples; None:
            parameters of calls whose rows are not where they seem to be are refused.
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
        kept: KeptLayers | None = None,
        scattered: Collection[str] | None = None,
    ) -> None:
        super().__init__(parameters, batch, samples, op, alone, known, kept, scattered)
        self.report = report
        self.balances = balances
        self.contributions: dict[int, list[Contribution]] = defaultdict(list)
        self.single: dict[int, str] = {}  # parameters that are used once, by id
        self.check: RowCheck | None = None
        self.running = False  # whether the backward pass is the one of the losses

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Tap the calls inside; the model's forward pass and its losses belong here.

        Raises:
            FisherpruneError: where activations are to be computed again later.
        """
        with running_once(self.op), self:
            yield

    def check_samples(
        self, result: Tensor, kind: Callable[[int], RowCheck] = RowCheck
    ) -> None:
        """See where rows are of other samples than they seem to be.

        Then their parameters are ``refused``.

        Args:
            result: of the forward pass, samples first.
            kind: of the check.
        """
        self.check = kind(self.samples)
        scores = scores_of(result)
        try:
            for factors in self.check.factors_in_turn():
                self.backward((scores * factors.to(scores)).sum(), again=True)
        finally:
            self.check = None

    def is_checking(
        self,
        call: object,
        layout: Layout | Scattered,
        grad: Tensor,
        shared: Iterable[int],
    ) -> bool:
        """Check a gradient in a backward pass of ``check_samples``.

        Args:
            call: whose output's gradient it is.
            layout: of the gradient; what is ``Scattered`` will be known.
            grad: of the call's output.
            shared: ids of the shared tensors of the call.
        """
        if self.check and not self._are_known(self.check, call, layout, local(grad)):
            names = self.names_of(shared)
            seems = self.check.reason == SEEMS_OTHER and isinstance(layout, Layout)
            if self.finds_rows and seems:
                self.scattered |= names
            else:
                self.refused = dict.fromkeys(names, self.check.reason) | self.refused
        if self.check is None and isinstance(layout, Scattered):
            if not layout.are_told(local(grad)):
                raise FisherpruneError(f"{self.op}: {UNTOLD % self._named(shared)}")
        return self.check is not None

    def _named(self, shared: Iterable[int]) -> str:
        return repr(min(self.names_of(shared)))

    def _are_known(
        self, check: RowCheck, call: object, layout: Layout | Scattered, grad: Tensor
    ) -> bool:
        """Return whether each row of a gradient is of one sample, the one it seems."""
        if isinstance(layout, Scattered):
            return check.trace(layout, layout.rows(grad))
        return not check.differs(call, layout.apart(grad))

    def names_of(self, shared: Iterable[int]) -> frozenset[str]:
        """Return the parameters that shared tensors come from, by their ids."""
        return frozenset[str]().union(*(self.roots[each] for each in shared))

    @property
    def must_check(self) -> bool:
        """Return whether sizes that were read from values may have made rows uneven."""
        return self.has_read_values and self.finder.has_several_entries

    def hear_of_gradients(self, inputs: object) -> None:
        """Refuse gradients of parameters: calls that the tap replaces have none."""
        for tensor in tensors_in(inputs) if self.replaces else ():
            if isinstance(tensor, nn.Parameter) or self.is_shared(tensor):
                raise OwnGradientsError(frozenset(self.parameters))

    def check_running(self, shared: int) -> None:
        """Refuse gradients that the model or the loss takes by itself."""
        if not self.running:
            raise OwnGradientsError(self.roots[shared])

    def collect(self, shared: int, contribution: Contribution) -> None:
        """Hand one use's contribution to ``report``, or keep it to join the uses."""
        if self.balances and isinstance(contribution, Factors | Blocks):
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
        self.has_own_backward |= way.has_own_functions
        outside = [n for n, p in self.parameters.items() if id(p) in way.leaves]
        if self.hidden and way.has_own_functions and self.hidden not in outside:
            raise FisherpruneError(f"{self.op}: {UNSEEN.format(self.hidden)}")
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
                if not recomputes(error):
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
