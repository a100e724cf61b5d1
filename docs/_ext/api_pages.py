"""A page for each part of the package, from the docstrings of its public names."""

import inspect
from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from sphinx.application import Sphinx
from written import write_pages

import fisherprune

TITLES = {
    "pruning": "Pruning",
    "scoring": "Scores and criteria",
    "statistics": "Statistics",
    "masks": "Masks",
    "parameters": "Parameters",
    "persample": "Gradients of samples",
    "subnetwork": "Masked networks",
    "errors": "Errors and warnings",
}
"""Of parts of the package, in the order of their pages; others follow."""
MODULES = ("losses", "baselines", "models", "data", "train")
"""Documented whole, like all of ``fisherprune.integrations``."""


def setup(app: Sphinx) -> dict:
    """Write the pages before any page is read."""
    app.connect("builder-inited", lambda app: write_pages("api", pages()))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def pages() -> dict[str, str]:
    """Return the pages by file name."""
    parts: dict[str, list[str]] = {part: [] for part in TITLES}
    for name in fisherprune.__all__:
        thing = getattr(fisherprune, name)
        if not inspect.ismodule(thing):
            parts.setdefault(thing.__module__.split(".")[1], []).append(name)
    found = {
        f"{i:02}_{part}.rst": page_of_names(part, names)
        for i, (part, names) in enumerate(parts.items())
        if names
    }
    for i, name in enumerate(documented_modules(), len(found)):
        found[f"{i:02}_{name.replace('.', '_')}.rst"] = page_of_module(name)
    return found


def documented_modules() -> list[str]:
    """Return the modules that have pages of their own, as far as they exist."""
    modules = {m.name for m in iter_modules(fisherprune.__path__)}
    names = [name for name in MODULES if name in modules]
    if "integrations" in modules:
        package = import_module("fisherprune.integrations")
        names += sorted(
            f"integrations.{m.name}"
            for m in iter_modules(package.__path__)
            if not m.name.startswith("_")
        )
    return names


def page_of_names(part: str, names: Iterable[str]) -> str:
    """Return the page of some of the package's names."""
    title = TITLES.get(part, part.replace("_", " ").capitalize())
    entries = [entry("fisherprune", name) for name in sorted(names, key=str.lower)]
    return "\n".join([title, "=" * len(title), "", *entries])


def page_of_module(name: str) -> str:
    """Return the page of a module: its docstring, and what is public in it."""
    full = f"fisherprune.{name}"
    head = ["=" * len(full), "", f".. automodule:: {full}", ""]
    names = public_names(import_module(full))
    return "\n".join([full, *head, *(entry(full, each) for each in names)])


def public_names(module: ModuleType) -> list[str]:
    """Return the functions and classes of ``__all__``, or those defined there."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, thing in vars(module).items()
            if not name.startswith("_")
            and getattr(thing, "__module__", "") == module.__name__
        ]
    things = {name: getattr(module, name) for name in names}
    wanted = inspect.isfunction, inspect.isclass
    return [n for n, t in things.items() if any(is_one(t) for is_one in wanted)]


def entry(module: str, name: str) -> str:
    """Return the directive of a function or a class."""
    thing = getattr(import_module(module), name)
    if not inspect.isclass(thing):
        return f".. autofunction:: {module}.{name}\n"
    return f".. autoclass:: {module}.{name}\n   :members:\n"
