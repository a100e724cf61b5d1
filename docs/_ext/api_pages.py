"""A page for each part of the package, from the docstrings of its public names."""

import ast
import inspect
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
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
MODULES = ("losses", "baselines", "sparse", "models", "data", "train")
"""Documented whole, like the files of ``fisherprune.integrations``."""
SHARED = ("holding",)
"""Of these, what several of them share."""


def setup(app: Sphinx) -> dict:
    """Write the pages before any page is read."""
    app.connect("builder-inited", lambda app: write_pages("api", pages()))
    app.connect(
        "builder-inited", lambda app: write_pages("names", {"names.txt": summaries()})
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def summaries() -> str:
    """Return a table of the public names, for a page to include."""
    rows = ["| Name | What it is or does |", "| --- | --- |"]
    for name in sorted(fisherprune.__all__, key=str.lower):
        thing = getattr(fisherprune, name)
        text = (inspect.getdoc(thing) or "").partition("\n")[0].replace("``", "`")
        text = re.sub(":math:`([^`]*)`", r"$\1$", text)
        kind = "mod" if inspect.ismodule(thing) else "obj"
        rows.append(f"| {{py:{kind}}}`{name} <fisherprune.{name}>` | {text} |")
    return "\n".join(rows) + "\n"


def pages() -> dict[str, str]:
    """Return the pages by file name."""
    parts: dict[str, list[str]] = {part: [] for part in TITLES}
    for name in fisherprune.__all__:
        thing = getattr(fisherprune, name)
        if not inspect.ismodule(thing):
            parts.setdefault(thing.__module__.split(".")[1], []).append(name)
    found = {part: page_of_names(part, names) for part, names in parts.items() if names}
    for name in MODULES:
        module = import_module(f"fisherprune.{name}")
        found[name] = page_of_module(module.__name__, public_names(module))
    for path in integrations():
        name = f"fisherprune.integrations.{path.stem}"
        found[f"integrations_{path.stem}"] = page_of_module(name, defined_in(path))
    return {f"{i:02}_{name}.rst": page for i, (name, page) in enumerate(found.items())}


def page_of_names(part: str, names: Iterable[str]) -> str:
    """Return the page of some of the package's names."""
    title = TITLES.get(part, part.replace("_", " ").capitalize())
    things = {name: getattr(fisherprune, name) for name in sorted(names, key=str.lower)}
    entries = [entry(f"fisherprune.{n}", inspect.isclass(t)) for n, t in things.items()]
    return "\n".join([title, "=" * len(title), "", *entries])


def page_of_module(module: str, names: Mapping[str, bool]) -> str:
    """Return the page of a module: its docstring, and what is public in it."""
    head = [module, "=" * len(module), "", f".. automodule:: {module}", ""]
    entries = (entry(f"{module}.{name}", kind) for name, kind in names.items())
    return "\n".join([*head, *entries])


def public_names(module: ModuleType) -> dict[str, bool]:
    """Return functions and classes of ``__all__``, or those defined in the module.

    True is said of classes.
    """
    own = {n for n, t in vars(module).items() if is_from(t, module) and n[0] != "_"}
    things = {n: getattr(module, n) for n in getattr(module, "__all__", own)}
    return {
        name: inspect.isclass(thing)
        for name, thing in things.items()
        if inspect.isclass(thing) or inspect.isfunction(thing)
    }


def is_from(thing: object, module: ModuleType) -> bool:
    """Return whether something says that it was defined in a module."""
    return getattr(thing, "__module__", "") == module.__name__


def integrations() -> list[Path]:
    """Return the files of the integrations, each of a library's name."""
    folder = Path(fisherprune.__file__).parent / "integrations"
    return [path for path in sorted(folder.glob("[!_]*.py")) if path.stem not in SHARED]


def defined_in(path: Path) -> dict[str, bool]:
    """Return what a file defines, without importing it and its library."""
    kinds = ast.FunctionDef, ast.ClassDef
    return {
        node.name: isinstance(node, ast.ClassDef)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, kinds) and not node.name.startswith("_")
    }


def entry(name: str, is_class: bool) -> str:
    """Return the directive of a function or a class."""
    if is_class:
        return f".. autoclass:: {name}\n   :members:\n"
    return f".. autofunction:: {name}\n"
