"""The values of a file's tables, each checked against what it must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fisherprune.errors import FieldError, FisherpruneError, near, shown
from fisherprune.files import read_json
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.kinds import Kind
from fisherprune.runs.option import names

T = TypeVar("T")
TABLE: Kind[dict[str, Any]] = Kind(
    "a table of fields", lambda value: isinstance(value, dict)
)


class Section:
    """One table of a file, read field by field; ``done`` finds what was not read.

    Every error begins with the file and the path inside it:
    ``exp.json: training.optimizer.learning_rate must be a number, got 'fast'``.
    """

    def __init__(self, file: str | Path, content: object, path: str = "") -> None:
        """Begin to read ``content``, which stands at ``path`` in ``file``.

        Raises:
            FisherpruneError: where it is no table.
        """
        self.file, self.path = file, path
        if not isinstance(content, dict):
            place = f"{file}: {path or 'the whole of it'}"
            raise FieldError(place, TABLE.words, shown(content))
        self.content = content
        self._read: list[str] = []

    def full(self, name: str) -> str:
        """Return the path of a field inside the file."""
        return f"{self.path}.{name}" if self.path else name

    def place(self, name: str) -> str:
        """Return file and path of a field, as errors begin."""
        return f"{self.file}: {self.full(name)}"

    def error(self, name: str, text: str) -> FisherpruneError:
        """Return an error about a field that is not one of its value."""
        return FisherpruneError(f"{self.place(name)} {text}")

    def wrong(self, name: str, wanted: str, got: object) -> FieldError:
        """Return the error that a field must be ``wanted``."""
        return FieldError(self.place(name), wanted, shown(got))

    def get(self, name: str, kind: Kind[T]) -> T:
        """Return the value of a field that must be there.

        Raises:
            FisherpruneError: where it is missing or something else.
        """
        self._read.append(name)
        if name not in self.content:
            raise self.error(name, f"is missing; it must be {kind.words}")
        value = self.content[name]
        if not kind.accepts(value):
            raise self.wrong(name, kind.words, value)
        return kind.convert(value)

    def section(self, name: str) -> Section:
        """Return the table under ``name``, which must be there."""
        return Section(self.file, self.get(name, TABLE), self.full(name))

    def sections(self) -> dict[str, Section]:
        """Return the tables of a table that holds nothing else."""
        return {name: self.section(name) for name in self.content}

    def done(self) -> None:
        """Raise FisherpruneError for a field that nobody asked for."""
        for name in self.content:
            if name not in self._read:
                place = f"fields of {self.path}" if self.path else "fields"
                known = f"the {place} are {', '.join(self._read)}"
                raise self.error(name, f"is unknown{near(name, self._read)}; {known}")


def read_fields(path: Path) -> Section:
    """Read a file that must hold a JSON object; see ``files.read_json``."""
    return Section(path, read_json(path))


def as_config(section: Section) -> TrainConfig:
    """Return the configuration that a table spells.

    Raises:
        FisherpruneError: for fields that are not known and values no run can have.
    """
    for name in section.content:
        if name not in names(TrainConfig):
            reason = "not written by this version of fisherprune"
            raise section.error(name, f"is no field of a configuration: {reason}")
    return make_config(section.content, section.place)


def make_config(values: dict[str, Any], place: Callable[[str], str]) -> TrainConfig:
    """Return the configuration of some fields.

    Args:
        values: of the fields, by name.
        place: where a field stands, by name: errors begin with it.

    Raises:
        FisherpruneError: for values no run can have.
    """
    try:
        return TrainConfig(**values)
    except FieldError as error:
        raise error.at(place(error.field)) from None
