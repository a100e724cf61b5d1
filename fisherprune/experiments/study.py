"""Our study files: TOML whose lists expand to the product of their values.

    name = "example"

    [run]                      # the same in every run; the rest is TrainConfig's
    dataset = "digits"
    model = "resnet20"

    [grid]                     # lists vary; the last field varies fastest
    method = ["none", "snip", "fts"]
    sparsity = [0.9, 0.98]

``[[grid]]``, several times, gives several products. A grid may also set a field to a
plain value. Method ``none`` ignores what only concerns masks: one dense run stays of
each product. Runs that are the same count once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import fields as fields_of
from itertools import product
from pathlib import Path
from typing import Any

from fisherprune.errors import FisherpruneError, near
from fisherprune.experiments.dense import collapsed
from fisherprune.files import read_as
from fisherprune.masks.densities import checked_densities, read_densities
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.identity import identity
from fisherprune.runs.kinds import KINDS, TEXT, Kind, list_of
from fisherprune.runs.option import about
from fisherprune.runs.section import Section, make_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DENSITIES: Kind[Any] = Kind(
    "a file's name or a table of numbers", lambda value: isinstance(value, str | dict)
)
FIELDS = {
    field.name: KINDS.get(field.type.removesuffix(" | None"), DENSITIES)
    for field in fields_of(TrainConfig)
    if field.name != "output_dir" and about(field).given
}
"""Fields that a study can set."""


@dataclass(frozen=True)
class Study:
    """One file: its name and its runs, in order, each once."""

    name: str
    runs: tuple[TrainConfig, ...]


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        FisherpruneError: where it can't be read, a field is unknown or of another type,
            or no run can have its values; names file and field.
    """
    whole = Section(path, read_as(path, tomllib.loads, "must be a TOML file"))
    name = whole.get("name", TEXT)
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise whole.wrong("name", "letters, digits, '.', '_' or '-'", name)
    for optional in ("description", "run", "grid"):
        whole.content.setdefault(optional, "" if optional == "description" else {})
    whole.get("description", TEXT)
    fixed = _fixed(whole.section("run"))
    runs: dict[str, TrainConfig] = {}
    for grid in _grids(whole):
        for config in _expand(grid, fixed, path.parent):
            runs.setdefault(identity(config), config)
    whole.done()
    return Study(name, tuple(runs.values()))


def _grids(whole: Section) -> list[Section]:
    """Return the tables under ``grid``: one, or each of several."""
    if not isinstance(whole.content["grid"], list):
        return [whole.section("grid")]
    several: Kind[list[object]] = Kind("tables", lambda value: len(value) > 0)
    tables = whole.get("grid", several)
    return [
        Section(whole.file, table, f"grid[{number}]")
        for number, table in enumerate(tables, 1)
    ]


def _fixed(run: Section) -> dict[str, tuple[str, object]]:
    """Return path and value of the fields that are the same in every run."""
    return {
        name: (run.full(name), run.get(name, _kind(run, name))) for name in run.content
    }


def _kind(section: Section, name: str) -> Kind:
    if name == "output_dir":
        raise section.error(name, "can't be set by a study; --output DIR does that")
    if name not in FIELDS:
        known = f"the fields of a run are {', '.join(FIELDS)}"
        raise section.error(name, f"is unknown{near(name, FIELDS)}; {known}")
    return FIELDS[name]


def _expand(grid: Section, fixed: dict, folder: Path) -> Iterator[TrainConfig]:
    """Yield the runs of one product."""
    choices = {name: _choices(grid, name, fixed) for name in grid.content}
    paths = {name: path for name, (path, _) in fixed.items()}
    paths |= {name: grid.full(name) for name in choices}
    constant = {name: value for name, (_, value) in fixed.items()}

    def place(name: str) -> str:
        return f"{grid.file}: {paths.get(name, name)}"

    for values in product(*choices.values()):
        run = collapsed(constant | dict(zip(choices, values, strict=True)))
        if run.get("densities") is not None:
            run["densities"] = _densities(run["densities"], place("densities"), folder)
        yield make_config(run, place)


def _choices(grid: Section, name: str, fixed: dict) -> tuple:
    """Return the values of a field of a grid: those of its list, or its only one."""
    kind = _kind(grid, name)
    if name in fixed:
        raise grid.error(name, f"is set already: by {fixed[name][0]}")
    value = grid.content[name]
    if kind.accepts(value):
        return (grid.get(name, kind),)
    plural = f"{kind.words}, or a list whose every item is {kind.words}"
    several = Kind(
        plural,
        lambda value: (
            isinstance(value, list) and value and all(map(kind.accepts, value))
        ),
        list_of(kind).convert,
    )
    return grid.get(name, several)


def _densities(value: str | dict, place: str, folder: Path) -> dict[str, float]:
    """Return densities from an inline table, or a file beside the study."""
    if isinstance(value, dict):
        return checked_densities(value, place)
    try:
        return read_densities(folder / value)
    except FisherpruneError as error:
        raise FisherpruneError(f"{place}: {error}") from None
