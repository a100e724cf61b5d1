"""Checkpoints: all a run needs to go on, in one file that is whole or not there."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.files import write_bytes

MAGIC = b"fisherprune-checkpoint-2\n"
"""What the file begins with; then the SHA-256 of the rest, and what torch.save made."""
DIGEST = hashlib.sha256().digest_size

State = dict[str, Any]
"""Nested dicts and lists of tensors, numbers, strings and None."""


class Checkpoint:
    """Where a run keeps its state; each save replaces the one before.

    Args:
        path: the file.
        run: identity of the run, kept in the file.
        background: whether ``save`` returns as soon as it has copied the state, and the
            file is written meanwhile: epochs on a GPU can be as short as the writing.
        written: called, by the thread that saves, once a checkpoint is on disk.
    """

    def __init__(
        self,
        path: Path,
        run: str,
        *,
        background: bool = False,
        written: Callable[[], None] | None = None,
    ) -> None:
        self.path, self.run, self.written = path, run, written
        self._pool = ThreadPoolExecutor(1) if background else None
        self._pending: Future[None] | None = None

    def save(self, state: State, then: Callable[[State], None] | None = None) -> None:
        """Write ``state``, then call ``then`` with it; end a save in progress first.

        Args:
            state: what the run goes on from.
            then: for files that must not be newer than the checkpoint.

        Raises:
            OSError: where a file can't be written; the old one stays. In the background
                it is raised by the next ``save`` or ``wait``.
        """
        self.wait()
        if self._pool is None:
            self._write(state, then)
            self._tell()
        else:
            self._pending = self._pool.submit(self._write, _copied(state), then)

    def wait(self) -> None:
        """Return once everything is written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            self._tell()

    def close(self) -> None:
        """End a save in progress, and raise nothing: for a run that has failed."""
        if self._pool is not None:
            self._pool.shutdown()

    def load(self) -> State | None:
        """Return the state, its tensors on the CPU; None where none was saved.

        Raises:
            FisherpruneError: where the file is damaged, is no checkpoint, or belongs to
                another run.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        payload = io.BytesIO(self._checked(content))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a TorchScript archive
                state = torch.load(payload, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load documents none
            raise self.unfit(type(error).__name__) from error
        if not isinstance(state, dict) or "run" not in state:
            raise self.unfit("no state")
        if state["run"] != self.run:
            raise FisherpruneError(
                f"checkpoint {self.path} must be of run {self.run}, got {state['run']}"
            )
        return state

    def unfit(self, got: str) -> FisherpruneError:
        """Return the error of a file that is whole and holds something else."""
        return self._error(f"must hold the state of this run, got {got}")

    def remove(self) -> None:
        """Delete the file, if there is one; to be called at the end of a run."""
        self.path.unlink(missing_ok=True)

    def _tell(self) -> None:
        if self.written is not None:
            self.written()

    def _write(self, state: State, then: Callable[[State], None] | None) -> None:
        buffer = io.BytesIO()
        torch.save({"run": self.run, **state}, buffer)
        payload = buffer.getvalue()
        write_bytes(self.path, MAGIC + hashlib.sha256(payload).digest() + payload)
        if then is not None:
            then(state)

    def _checked(self, content: bytes) -> memoryview:
        """Return what torch.save made, if it is what was written."""
        start = len(MAGIC) + DIGEST
        if not content.startswith(MAGIC):
            raise self._error("is no checkpoint of this version of fisherprune")
        if hashlib.sha256(content[start:]).digest() != content[len(MAGIC) : start]:
            raise self._error("is damaged")
        return memoryview(content)[start:]

    def _error(self, reason: str) -> FisherpruneError:
        return FisherpruneError(
            f"checkpoint {self.path} {reason}; delete it to begin the run again"
        )


def _copied(state: Any) -> Any:
    """Return the state with copies on the CPU for its tensors."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state


def misfit(value: object, form: object, place: str = "state") -> str | None:
    """Return the first place where a value has another form; None where it fits.

    Args:
        value: of a state.
        form: a dict of forms under the same keys; a list with the form of all items; a
            tuple of forms, one of which must fit; a tensor of the shape and dtype; a
            type; anything else stands for its own type.
        place: of the value in the state.
    """
    if isinstance(form, tuple):
        places = [misfit(value, each, place) for each in form]
        return places[-1] if all(places) else None
    if isinstance(form, dict):
        if not isinstance(value, dict) or value.keys() != form.keys():
            return place
        parts = ((value[key], form[key], f"{place}.{key}") for key in form)
    elif isinstance(form, list):
        if not isinstance(value, list):
            return place
        parts = ((item, form[0], f"{place}[{i}]") for i, item in enumerate(value))
    else:
        return None if _is_alike(value, form) else place
    return next(filter(None, (misfit(*part) for part in parts)), None)


def _is_alike(value: object, form: object) -> bool:
    if isinstance(form, Tensor):
        return (
            isinstance(value, Tensor)
            and (value.layout, value.dtype) == (form.layout, form.dtype)
            and value.shape == form.shape
        )
    return type(value) is (form if isinstance(form, type) else type(form))
