"""A CUDA graph's twin on the CPU: functions recorded with their memory.

While it records, nothing is done. A replay runs no Python of the model: it calls the
functions again, with the numbers that they had, on the same memory, and puts results
where they were. What a CUDA graph can't hold raises an error, as it does there.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fisherprune.statistics.structure import tensors_in

FORBIDDEN = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def waits(func, args):
    """Return whether a function reads values; an index does of masks alone."""
    if func is torch.ops.aten.index.Tensor:
        return any(each.dtype == torch.bool for each in args[1] if each is not None)
    return bool(FORBIDDEN & {*func.tags})


def number_of(tensor):
    return tensor.untyped_storage()._cdata


class CpuGraph:
    """A recorder, see ``fisherprune.statistics.recording.Recorder``."""

    def __init__(self, device):
        self.calls, self.replays = [], 0

    @contextmanager
    def warming_up(self):
        yield

    @contextmanager
    def recording(self):
        recording = _Recording()
        try:
            with recording:
                yield
        finally:
            recording.undo()
        self.calls = recording.calls

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors_in(results), tensors_in(again), strict=True):
                if number_of(old) != number_of(new):
                    old.copy_(new)


class CpuGraphs(list):
    """Makes recorders of a kind, and has those that it made."""

    kind = CpuGraph

    def __call__(self, device):
        self.append(self.kind(device))
        return self[-1]

    @property
    def replays(self):
        """Return how often any of them was run."""
        return sum(each.replays for each in self)


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []
        self.made, self.before = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(func, args):
            raise RuntimeError("operation not permitted when stream is capturing")
        given = {number_of(t): t for t in tensors_in((*args, *kwargs.values()))}
        if func._schema.is_mutable:
            for number, tensor in given.items():
                if number not in self.made and number not in self.before:
                    storage = tensor.untyped_storage()
                    self.before[number] = storage, storage.clone()
        results = func(*args, **kwargs)
        for tensor in tensors_in(results):
            if number_of(tensor) not in given:
                self.made[number_of(tensor)] = tensor
        self.calls.append((func, args, kwargs, results))
        return results

    def undo(self):
        """Undo what was done; what was made holds nothing that can be used."""
        for storage, before in self.before.values():
            storage.copy_(before)
        for tensor in self.made.values():  # the first is NaN, the second a large number
            byte = 0xFF if tensor.is_floating_point() else 0x3F
            tensor.untyped_storage().fill_(byte)
