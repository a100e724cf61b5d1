"""What records a device's work as a graph, and what sees whether it can be one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fisherprune.statistics.structure import tensors_in

WAITS = "called a synchronizing CUDA operation"
"""What torch warns of."""

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXES = frozenset("index index_put index_put_ _unsafe_index _index_put_impl_".split())
"""Functions that read values of masks alone, to know how many places these have."""


class UnfitError(RuntimeError):
    """Says why a batch can't be a graph."""


class Recorder(Protocol):
    """Records work of a device once, to have it done again and again."""

    def warming_up(self) -> AbstractContextManager[None]:
        """Do the work inside, as it will be recorded.

        Raises:
            UnfitError: where Python waits for the device.
        """

    def recording(self) -> AbstractContextManager[None]:
        """Record the work inside, without doing it."""

    def replay(self) -> None:
        """Do the work: in the same memory, with the numbers that Python had."""


class CudaRecorder:
    """A CUDA graph.

    Args:
        device: whose work it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Do the work on the stream of the recording.

        Where a recording fails, older versions of torch leave their allocator unusable:
        so waits are looked for here.
        """
        here = torch.cuda.current_stream(self._stream.device)
        mode = torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(here)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                here.wait_stream(self._stream)
        if any(WAITS in f"{each.message}" for each in caught):
            raise UnfitError("a function waits for the device")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record; other threads, such as those of a DataLoader, may allocate."""
        graph = torch.cuda.graph(
            self._graph, stream=self._stream, capture_error_mode="thread_local"
        )
        # Of its own, for the other does not leave the stream where recording fails.
        with torch.cuda.stream(self._stream), graph:
            yield

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""By the type of a device."""


class Watch(TorchDispatchMode):
    """Sees what functions read.

    Attributes:
        reason: why a graph can't hold them; empty where it can.
        read: the memory that they read and did not make, by number. A graph reads it
            again, so it must stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""
        self.read: dict[int, torch.UntypedStorage] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function."""
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        values = *args, *kwargs.values()
        given, made = tensors_in(values), tensors_in(results)
        self.reason = self.reason or _why_unfit(func, values, given, made)
        for tensor in given:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made:
                self.read[storage._cdata] = storage
        fresh = {tensor.untyped_storage()._cdata for tensor in made}
        self._made |= fresh - self.read.keys()
        return results


def _why_unfit(
    func: Any, values: Sequence[object], given: list[Tensor], made: list[Tensor]
) -> str:
    """Return why a graph can't hold a call of a function."""
    name = func.overloadpacket.__name__
    is_mask = [tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:]]
    if any(is_mask) if name in INDEXES else READS & {*func.tags}:
        return f"{name} reads values"
    if len({t.device for t in (*given, *made)}) > 1:
        return f"{name} copies from one device to another"
    if name == "lift_fresh":
        return "a tensor is made of numbers of Python"
    if any(isinstance(each, torch.Generator) for each in values):
        return f"{name} draws from a generator of its own"
    if "c10d" in func.namespace:
        return f"{name} sends to other ranks"
    return ""
