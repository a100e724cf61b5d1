"""Second moments of the user's own backward passes, beside their gradients."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.modules import unwrapped
from fisherprune.parameters import Parameters, check_finite
from fisherprune.persample.backward import taps_of
from fisherprune.persample.calls import unmark
from fisherprune.persample.contributions import Gradients
from fisherprune.persample.observing import BackwardMode, ObservingTap
from fisherprune.statistics.accumulators import Accumulators, Sums
from fisherprune.statistics.batches import Batch
from fisherprune.statistics.gradient_moments import GradientMoments
from fisherprune.statistics.passes import Task, checked_task
from fisherprune.statistics.sample_calls import (
    SampleCalls,
    call_batch,
    find_calls,
    key_of,
)
from fisherprune.statistics.scale import lost, warn_of_lost
from fisherprune.statistics.structure import tensors_in
from fisherprune.statistics.watching import (
    Run,
    Watched,
    check_seen,
    check_watchable,
    checked_tap,
    put_back,
)

if TYPE_CHECKING:
    from typing_extensions import Self

OP = "moments"
Scale = float | Callable[[], float]


def moments(
    model: nn.Module,
    *,
    parameters: Parameters | None = None,
    reduction: str = "mean",
    scale: Scale = 1.0,
    same_bits: bool = False,
) -> Moments:
    r"""Watch a training step: its gradients as ever, and their squares by sample.

    Inside of the context the model runs, and ``loss.backward()`` fills each ``.grad``,
    as without it. Beside that, the gradients of the single samples are squared and
    added up, exactly and without being held in memory. Of a batch of N samples with

    .. math:: L = \frac1N \sum_n \ell_n, \quad G_n = \nabla \ell_n,

    where :math:`\ell_n` depends on the n-th sample alone, ``result()`` has the mean of
    :math:`G_n`, which is the gradient, and that of :math:`G_n \odot G_n`: F, the
    empirical Fisher diagonal. Several backward passes, each behind a forward pass of
    its own, add up to one larger batch.

    What a loss makes of the model's output is not seen. Where it couples samples
    (contrastive losses, a balance of experts), :math:`\ell_n` is not defined, and F
    means nothing. Where the mean is over other things than samples (the tokens of all
    texts, class weights), :math:`\ell_n` is N times what the n-th sample adds to it.

    Each ``.grad`` is the same up to rounding: those of float32 weights of linear layers
    and convolutions come from the kernels that square them. With ``same_bits`` autograd
    computes these a second time, and each ``.grad`` has the bits it has without the
    context, where those are always the same, with two exceptions: recurrent layers of
    which parameters are watched run as linear layers, and autocast rounds the gradients
    of a weight that is used several times one by one. Compiled models run as they are
    written.

    Args:
        model: as it is trained, in its own modes, dropout included. BatchNorm layers
            must be in eval mode, for in train mode they mix samples: measure their
            statistics before, with ``measure_batchnorm``, and leave them in eval mode,
            or use ``gradient_moments``. Tensors in the model's arguments have the
            samples first, and so has at least one in its output.
        parameters: by name, ``prunable_parameters(model)`` by default; none frozen.
        reduction: of the loss over samples: "mean", or "sum" for
            :math:`L = \sum_n \ell_n`.
        scale: the factor of the loss, or a function that returns it at each backward
            pass: ``scaler.get_scale`` of a GradScaler; 1 / steps where the loss is
            divided by the number of steps whose gradients are accumulated.
        same_bits: whether autograd computes all gradients that go to ``.grad``.

    Where a batch's samples are in the model's calls is found when it is called: two
    samples run once more, and one alone; in eval mode where the model draws random
    numbers, and then eight samples in its own modes. Hooks of the model's layers see
    these runs; its buffers and torch's random state are put back. What was found is
    used again where the same ``Moments`` are entered again, so make them before the
    loop. Where values decide which row is of which sample (sorting, experts), each
    batch is checked by two or more backward passes from the model's output.

    In DistributedDataParallel ``.grad`` is the mean over all ranks as ever, but the
    moments are those of the rank's own samples.

    Returns:
        A context manager, which may be entered again and again; its ``result()`` are
        the ``GradientMoments`` since it was entered.

    Raises:
        FisherpruneError: where an argument is wrong, or a parameter is frozen, hooked
            or sharded; and inside of the context where samples mix, the gradients of
            single samples are not seen, a watched parameter is used outside of the
            model's call (run the backward pass of a penalty apart), activations are
            checkpointed, or a backward pass is not ``loss.backward()``, has
            ``create_graph`` or ``inputs``, or leads through several forward passes, or
            for a second time through one.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, y = torch.randn(16, 5), torch.randint(3, (16,))
        >>> with moments(net) as m:
        ...     nn.functional.cross_entropy(net(x), y).backward()
        >>> found = m.result()
        >>> gradient = net[0].weight.grad
        >>> found.samples, torch.allclose(found.mean["0.weight"], gradient, atol=1e-6)
        (16, True)
        >>> bool((found.fisher["0.weight"] >= gradient.square() - 1e-6).all())
        True
    """
    if reduction not in ("mean", "sum"):
        raise FieldError(f"{OP}: reduction", "'mean' or 'sum'", shown(reduction))
    if not callable(scale):
        _checked_scale(scale)
    if not isinstance(same_bits, bool):
        raise FieldError(f"{OP}: same_bits", "True or False", shown(same_bits))
    task = checked_task(model, (), parameters)
    return Moments(task, reduction == "mean", scale, same_bits)


class Moments:
    """What ``fisherprune.moments`` returns: to be entered, once or again and again.

    Entering begins anew.
    """

    def __init__(
        self, task: Task, is_mean: bool, scale: Scale, same_bits: bool
    ) -> None:
        self._task, self._model = task, unwrapped(task.model)
        self._is_mean, self._scale, self._same_bits = is_mean, scale, same_bits
        self._found: dict[object, SampleCalls] = {}
        self._context: ExitStack | None = None
        self._begin()

    def __enter__(self) -> Self:
        check_watchable(OP, self._task, self._model)
        self._begin()
        with ExitStack() as context:
            if "torch._dynamo" in sys.modules:  # compiled code can't be tapped
                context.enter_context(torch.compiler.set_stance("force_eager"))
            context.enter_context(BackwardMode(self._backward))
            own = vars(self._model)
            context.callback(put_back, own, own.get("forward"))
            watched = Watched(self._model, self._call)
            own["forward"] = MethodType(watched, self._model)
            self._context = context.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._context is not None
        self._context.close()

    def result(self) -> GradientMoments:
        """Return the moments of the backward passes since the context was entered.

        Raises:
            FisherpruneError: where there was none or one has failed, or F is not
                finite as float32, as in steps that a GradScaler skips.
        """
        if self._failed or not self._samples:
            came = "one that failed" if self._failed else "none"
            raise FisherpruneError(
                f"{OP}: there must be backward passes inside of the context, each of "
                f"the loss of a call of the model, got {came}"
            )
        sums: tuple[Sums, Sums] = {}, {}
        for factor, each in self._sums.items():
            for total, parts, power in zip(sums, each.sums(), (1, 2), strict=True):
                for name, part in parts.items():
                    more = part * factor**power
                    total[name] = total[name] + more if name in total else more
        check_finite(sums[1], "the mean squared gradient")
        warn_of_lost(OP, lost(*sums), "scale the loss up, and say so by scale")
        paths = {n: tuple(sorted(self._ways[n])) for n in self._task.parameters}
        return GradientMoments(*sums, self._samples, self._samples, 1, paths)

    def _begin(self) -> None:
        self._sums: dict[float, Accumulators] = {}
        """By the factor that losses lack."""
        self._ways: dict[str, set[str]] = defaultdict(set)
        self._samples, self._failed = 0, False

    def _call(self, forward: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model, tapped."""
        batch = call_batch(args, kwargs)
        calls = self._calls(forward, batch) if batch.size > 1 else None
        known = calls.known if calls else None
        options = batch.tensors, batch.size, self._add, OP, None, known
        tap = ObservingTap(self._task.parameters, *options)
        if calls and not self._same_bits:
            tap.fuses = calls.once
        try:
            with tap.forward():
                output = forward(*args, **kwargs)
        finally:
            unmark(batch.tensors)
        unmark(tensors_in(output))
        if calls:
            calls.check(tap, output)
        if tap.refused:  # of a model that was changed, maybe
            self._found.clear()
        check_seen(OP, tap)
        return output

    def _calls(self, forward: Run, batch: Batch) -> SampleCalls:
        key = key_of(self._model, batch)
        if (found := self._found.get(key)) is None:
            found = find_calls(OP, self._task, forward, batch)
            if not found.unsure:
                self._found[key] = replace(found, may_vary=False)
        return found

    def _backward(self, loss: Tensor, run: Run, options: dict[str, Any]) -> None:
        """Run a backward pass; where calls of the model lead to the loss, add squares.

        Args:
            loss: of the pass.
            run: the pass.
            options: of ``loss.backward``.
        """
        taps = [tap for tap in taps_of(loss) if tap.report == self._add]
        if not taps:
            run(loss, **options)
            return
        tap = checked_tap(OP, taps, loss, options)
        if tap.computed:  # gradients of what is computed go back sample by sample
            options = {**options, "retain_graph": True}
        self._adding = self._accumulators(tap.samples)
        self._adding.begin(tap.samples)
        failed, self._failed, tap.spent = self._failed, True, True
        with tap.receiving():
            run(loss, **options)
        tap.computed.clear()
        self._adding.end()
        self._failed = failed
        self._samples += tap.samples
        for name, ways in tap.ways.items():
            self._ways[name] |= ways

    def _accumulators(self, samples: int) -> Accumulators:
        scale = self._scale() if callable(self._scale) else self._scale
        factor = (samples if self._is_mean else 1) / _checked_scale(scale)
        new = Accumulators(self._task.parameters, 1)
        return self._sums.setdefault(factor, new)

    def _add(self, name: str, gradients: Gradients) -> None:
        self._adding.add(name, gradients)


def _checked_scale(scale: object) -> float:
    if (
        isinstance(scale, bool)
        or not isinstance(scale, int | float)
        or not 0 < scale < math.inf
    ):
        wanted = "a number above 0, or a function that returns one"
        raise FieldError(f"{OP}: scale", wanted, shown(scale))
    return float(scale)
