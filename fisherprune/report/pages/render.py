"""Fills the templates of the pages, each of which escapes what it shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fisherprune.report.figures.style import method_name, method_style
from fisherprune.report.pages.content import Report, accuracy_rows, texts_of
from fisherprune.report.printable import one_line, printable
from fisherprune.runs.words import aligned


def html(content: Mapping[str, object]) -> str:
    """Return one HTML page that needs nothing else: no script, no network."""
    return _environment(_as_html).get_template("page.html.jinja").render(content)


def markdown(content: Mapping[str, object]) -> str:
    """Return the whole report but the figures as Markdown."""
    environment = _environment(escape_markdown)
    return environment.get_template("report.md.jinja").render(content)


@cache
def _environment(escape: Callable[[object], object]) -> Environment:
    """Return an environment in which every value that is shown passes ``escape``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=escape is _as_html,
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"method_name": method_name, "method_style": method_style}
    return environment


def _as_html(value: object) -> object:
    """Return printable text, which Jinja escapes, or what is HTML already."""
    return value if isinstance(value, Markup) else printable(value)


def escape_markdown(value: object) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", one_line(value))


def terminal(report: Report) -> str:
    """Return the table of the best validation weights of each setting as text."""
    blocks = []
    for table in report.tables:
        rows = texts_of(table, accuracy_rows(table, "best"))
        blocks.append(
            f"{table.title}: test accuracy in %, mean ± standard deviation (n), best "
            f"validation weights\n\n{aligned(rows)}"
        )
    return "\n\n".join([*blocks, f"runs: {report.tally}"])
