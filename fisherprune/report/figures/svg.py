"""Figures of matplotlib as SVG that many of can live in one page, equal every time."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

from fisherprune.errors import FisherpruneError
from fisherprune.report.figures.style import RC

WIDTH = 11.0
"""Of every figure, in inches."""


@dataclass(frozen=True)
class Figure:
    """A figure, or the sentence that stands where there can be none."""

    id: str
    title: str
    caption: str
    svg: str | None
    """None: only the caption is shown, which says why."""


def require_matplotlib() -> None:
    """Raise FisherpruneError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FisherpruneError(
            "the report draws with matplotlib, which is not installed: "
            'python -m pip install "fisherprune[report]"'
        ) from None


def draw(id: str, title: str, alt: str, height: float, paint: Callable) -> str:
    """Return a figure as an SVG element.

    Args:
        id: of the figure in the page; all ids inside begin with it.
        title: accessible name.
        alt: accessible description: what is seen.
        height: in inches.
        paint: takes the ``matplotlib.figure.Figure`` and draws on it.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(RC | {"svg.hashsalt": id}):
        figure = Canvas(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    return _embedded(text.getvalue(), id, title, alt)


def _embedded(text: str, id: str, title: str, alt: str) -> str:
    """Make a part of a page from an SVG file."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{id}-', text)
    text = re.sub(r'href="#', f'href="#{id}-', text)
    text = re.sub(r"url\(#", f"url(#{id}-", text)
    text = re.sub(r' (d|transform|x|y|width|height)="[^"]*"', _shorter, text)
    view = re.search(r'viewBox="[^"]*"', text)[0]
    head = (
        f'<svg {view} xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-labelledby="{id}-name {id}-alt">'
        f'<title id="{id}-name">{html.escape(title)}</title>'
        f'<desc id="{id}-alt">{html.escape(alt)}</desc>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)


def _shorter(attribute: re.Match) -> str:
    """Round coordinates to a hundredth of a point, which nobody sees."""
    return re.sub(r"-?\d+\.\d{3,}", _short, attribute[0])


def _short(number: re.Match) -> str:
    text = f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
