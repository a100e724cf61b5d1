"""Finds the samples in the tensors of calls."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

from torch import Tensor

from fisherprune.persample.alone import Record, Records
from fisherprune.persample.arguments import Arguments, without_tensors
from fisherprune.persample.backward import has_taps
from fisherprune.persample.calls import (
    Key,
    Rows,
    Tracking,
    is_ragged,
    is_transformed,
)
from fisherprune.persample.layout import Alone, Layout, LayoutError, find_layout
from fisherprune.shards import is_split, local


@dataclass(frozen=True)
class Known:
    """What was found out about a call.

    Attributes:
        arguments: as for one sample alone, with an empty tensor in the place of each.
        layouts: of its tensors, in order; None for what is none of the samples.
        output: None where it is none of the samples, or not known yet.
        input: of a layer whose first tensor alone is of samples; None of other calls.
        copies: whether it may run with a copy of what is shared for each sample; not
            where that was tried in vain.
    """

    arguments: Arguments
    layouts: tuple[Layout | None, ...]
    output: Layout | None = None
    input: Layout | None = None
    copies: bool = True

    def of(self, samples: int) -> Known:
        """Return the same for another number of samples."""
        for each in (*self.layouts, self.output):
            if each is not None and each.samples != samples:
                break
        else:
            return self
        layouts = (each and replace(each, samples=samples) for each in self.layouts)
        output = self.output and replace(self.output, samples=samples)
        return Known(self.arguments, tuple(layouts), output, copies=self.copies)


class Finder:
    """Finds the layouts of calls' tensors, and remembers them by call.

    Args:
        tracking: knows which tensors are shared, and which are of samples.
        samples: N.
        alone: the calls of the last sample alone; None where ``known`` has all calls
            of batches of these shapes, or there is one sample.
        known: what was found out about calls, to which more is added.
    """

    def __init__(
        self,
        tracking: Tracking,
        samples: int,
        alone: Records | None,
        known: dict[Key, Known],
    ) -> None:
        # No cycle: what a tap holds, the sums of a pass, goes when the tap does.
        self.tracking, self.samples = weakref.proxy(tracking), samples
        self.alone, self.known = alone, known
        self.is_unlike = False  # whether another sample alone may say more
        self.is_unsure = False  # whether other batches must show whose rows are whose

    @property
    def has_several_entries(self) -> bool:
        """Return whether a sample has several entries in an axis of samples."""
        layouts = (known.layouts for known in self.known.values())
        return any(each and each.entries > 1 for some in layouts for each in some)

    def find(self, key: Key, arguments: Arguments, tensors: list[Tensor]) -> Known:
        """Find the samples in what a call reads.

        Raises:
            LayoutError: where they are not found.
        """
        if any(map(is_transformed, tensors)):
            raise LayoutError("it runs inside of a transform of torch.func")
        if any(map(is_ragged, tensors)):
            raise LayoutError("it reads a sparse or a nested tensor")
        rows = self.tracking.rows_of(tensors)
        if self.samples == 1:
            layouts = [Layout(0, 1) if self._is_of_sample(t) else None for t in tensors]
            found = Known(without_tensors(arguments), tuple(layouts), Layout(0, 1))
        elif rows == Rows.UNEVEN:
            raise LayoutError("it may read other numbers of rows of each sample")
        elif key in self.known:
            found = self.known[key].of(self.samples)
            for layout, tensor in zip(found.layouts, tensors, strict=True):
                if layout and not layout.fits(tensor):
                    raise LayoutError("it reads another number of rows in each batch")
        else:
            record = self._record(key)
            layouts = [*map(self._layout, record.tensors, tensors)]
            found = Known(record.arguments, tuple(layouts))
        if self.samples > 1 and rows == Rows.MOVED:
            self.tracking.moved = True
        self.known[key] = found
        return found

    def find_output(
        self, key: Key, output: object, samples: int | None = None
    ) -> Known:
        """Find the samples in a call's result, too.

        Args:
            key: of the call.
            output: its result.
            samples: in the result, where it is one of fewer samples, the last one too.

        Raises:
            LayoutError: where they are not found, or the result is no tensor that has
                a gradient.
        """
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise LayoutError("its result is no tensor of floating-point numbers")
        known = self.known[key]
        if known.output is None:
            alone = self._record(key).output
            if self.alone and alone and alone.value is None:
                self.alone.is_open = True
                raise LayoutError("its result was not kept")  # one more run keeps it
            layout = self._layout(alone, output, samples) if alone else None
            if layout is None:
                raise LayoutError("its result is none of the samples")
            layout = replace(layout, samples=self.samples)
            self.known[key] = known = replace(known, output=layout)
        return known

    def makes_samples(self, key: Key, output: object) -> bool:
        """Return whether a call gave what all share an axis of the samples."""
        if self.samples == 1 or not isinstance(output, Tensor):
            return False
        if self.known[key].output:
            return True
        alone = self._record(key).output if self.alone else None
        return alone is not None and alone.shape != local(output).shape

    def _record(self, key: Key) -> Record:
        record = self.alone.by_key.get(key) if self.alone else None
        if record is None:
            self.is_unlike = True
            raise LayoutError("one sample alone leads to other calls than the batch")
        return record

    def _is_of_sample(self, tensor: Tensor) -> bool:
        """Return whether a lone sample may be in it, or parts of the pass's graph."""
        if self.tracking.is_shared(tensor):
            return False
        return self.tracking.is_marked(tensor) or tensor.grad_fn is not None

    def _layout(
        self, alone: Alone, tensor: Tensor, samples: int | None = None
    ) -> Layout | None:
        assert self.alone
        if alone.value is None and tensor.shape == alone.shape:
            if self.tracking.is_shared(tensor):
                return None
        layout = find_layout(
            alone,
            local(tensor),
            samples or self.samples,
            self.alone.sample,
            self.alone.differ,
            self.alone.closest,
        )
        if layout and is_split(tensor, layout.axis):
            raise LayoutError("its samples are split over ranks")
        if layout and not layout.is_sure:
            self.is_unsure = self.tracking.moved = True
        if layout is None and not self.tracking.is_shared(tensor):
            if self.tracking.is_marked(tensor):
                self.is_unlike = True
                raise LayoutError(
                    "what it reads has no axis of the samples: all were reduced to it, "
                    "or it is of one alone"
                )
            if tensor.grad_fn and has_taps(tensor):
                raise LayoutError("where a tensor that it reads comes from is not seen")
        if layout:
            is_read = self.alone.is_held(alone.value)
            self.note_alike(layout, tensor, is_read=is_read)
        return layout

    def note_alike(self, layout: Layout, tensor: Tensor, *, is_read: bool) -> None:
        """Note whether all samples may be the same in a tensor of the first batch.

        Then samples may mix behind it, and values don't show it but gradients do.
        """
        if self.alone and tensor.requires_grad and tensor.is_floating_point():
            self.alone.note_outermost(tensor, layout, is_read=is_read)
