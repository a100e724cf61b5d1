"""Figures as SVG: many can stand in one page, and equal ones are equal files."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

from fisherprune.packages import required
from fisherprune.report.figures.registry import Figure
from fisherprune.report.figures.style import RC

WIDTH = 11.0
"""Of every figure, in inches."""


@dataclass(frozen=True)
class DrawnFigure:
    """A figure as a page shows it."""

    id: str
    """In the page; all ids inside begin with it."""
    title: str
    """What it shows of which runs: its accessible name."""
    figure: Figure
    view_box: str
    svg: str
    """What is inside the ``svg`` element; "" where only the caption is shown."""


def require_matplotlib() -> None:
    """Raise FisherpruneError where matplotlib is not installed."""
    remedy = 'python -m pip install "fisherprune[report]"'
    required("matplotlib", "the report draws with matplotlib", remedy)


def draw(figure: Figure, id: str, title: str) -> DrawnFigure:
    """Draw a figure.

    Args:
        figure: what to draw.
        id: see ``DrawnFigure``.
        title: see ``DrawnFigure``.
    """
    if figure.paint is None:
        return DrawnFigure(id, title, figure, "", "")
    import matplotlib
    import matplotlib.figure
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context(RC | {"svg.hashsalt": id}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing"
        )  # the reader's font has it
        canvas = matplotlib.figure.Figure((WIDTH, figure.height), layout="constrained")
        FigureCanvasSVG(canvas)
        figure.paint(canvas)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(text, format="svg", metadata=nothing)
    return DrawnFigure(id, title, figure, *_embedded(text.getvalue(), id))


def _embedded(text: str, id: str) -> tuple[str, str]:
    """Return the view box of an SVG file and what is inside its ``svg`` element."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{id}-', text)
    text = re.sub(r'href="#', f'href="#{id}-', text)
    text = re.sub(r"url\(#", f"url(#{id}-", text)
    text = re.sub(r' (d|transform|x|y|width|height)="[^"]*"', _shorter, text)
    head, _, inside = text[text.index("<svg") :].partition(">")
    _, _, view_box = head.partition('viewBox="')
    return view_box.partition('"')[0], inside.rpartition("</svg>")[0]


def _shorter(attribute: re.Match[str]) -> str:
    """Round coordinates to a hundredth of a point, which nobody sees."""
    return re.sub(r"-?\d+\.\d{3,}", _short, attribute[0])


def _short(number: re.Match[str]) -> str:
    text = f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
