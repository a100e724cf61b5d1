"""Values of a configuration file, each checked against what it must be."""

from __future__ import annotations

from collections.abc import Iterable

from fisherprune.errors import FisherpruneError, near, shown
from fisherprune.runs.kinds import Kind


class Section:
    """One table of a file, read field by field; ``done`` finds what was not read.

    Every error begins with the file and the path inside it:
    ``exp.json: training.optimizer.learning_rate must be a number, got 'fast'``.
    """

    def __init__(self, file: str, content: object, path: str = "") -> None:
        """Begin to read ``content``, which stands at ``path`` in ``file``.

        Raises:
            FisherpruneError: where it is no table.
        """
        self.file, self.path = file, path
        if not isinstance(content, dict):
            name = path or "the whole of it"
            raise self.error(name, f"must be a table of fields, got {shown(content)}")
        self.content = content
        self._read: list[str] = []

    def error(self, name: str, text: str) -> FisherpruneError:
        """Return an error about the full path ``name``."""
        return FisherpruneError(f"{self.file}: {name} {text}")

    def full(self, name: str) -> str:
        """Return the path of a field of this section."""
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str, kind: Kind, choices: Iterable | None = None):
        """Return the value of a field that must be there.

        Raises:
            FisherpruneError: where it is missing or something else.
        """
        choices = None if choices is None else list(choices)
        words = kind.words if choices is None else _one_of(choices)
        value = self._required(name, words)
        if not kind.accepts(value) or (choices is not None and value not in choices):
            raise self.error(self.full(name), f"must be {words}, got {shown(value)}")
        return kind.convert(value)

    def section(self, name: str) -> Section:
        """Return the table under ``name``, which must be there."""
        content = self._required(name, "a table of fields")
        return Section(self.file, content, self.full(name))

    def done(self) -> None:
        """Raise FisherpruneError for a field that nobody asked for."""
        for name in self.content:
            if name not in self._read:
                place = f"fields of {self.path}" if self.path else "fields"
                known = f"the {place} are {', '.join(self._read)}"
                raise self.error(
                    self.full(name), f"is unknown{near(name, self._read)}; {known}"
                )

    def _required(self, name: str, words: str) -> object:
        self._read.append(name)
        if name not in self.content:
            raise self.error(self.full(name), f"is missing; it must be {words}")
        return self.content[name]


def _one_of(choices: list) -> str:
    names = [repr(choice) for choice in choices]
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
