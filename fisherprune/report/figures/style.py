"""The style of all figures: a method has one colour, line and marker everywhere."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same layout everywhere
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a name is a $
}
"""Settings of matplotlib while a figure is drawn."""


Dashes = str | tuple[int, tuple[float, ...]]
"""A line style of matplotlib."""


@dataclass(frozen=True)
class LineStyle:
    """How a line and its points are drawn."""

    color: str
    marker: str
    dashes: Dashes

    @property
    def marker_size(self) -> float:
        """In points: pointed markers must be larger to appear as large as others."""
        return {"*": 9.5, "P": 7, "X": 6.8, "h": 6.5, "D": 5}.get(self.marker, 5.8)


SOLID: Dashes = "-"
DASHED: Dashes = (0, (5, 1.6))
DOTTED: Dashes = (0, (1.2, 1.4))

METHOD_STYLES = {
    "none": LineStyle("#111111", "", DASHED),
    "random": LineStyle("#8a8a8a", "o", SOLID),
    "magnitude": LineStyle("#d98e00", "s", SOLID),
    "grad_norm": LineStyle("#3fa7e0", "^", SOLID),
    "snip": LineStyle("#0b5fa5", "D", SOLID),
    "prospr": LineStyle("#0b5fa5", "H", DASHED),
    "grasp": LineStyle("#00875f", "v", SOLID),
    "grasp_reversed": LineStyle("#00875f", "<", DASHED),
    "ntk_sap": LineStyle("#5b7f00", "d", SOLID),
    "fisher_diag": LineStyle("#c9659a", "P", SOLID),
    "fisher_pruner": LineStyle("#7a1f4f", "X", SOLID),
    "obd": LineStyle("#7a1f4f", "p", DASHED),
    "fts": LineStyle("#d1450b", "*", SOLID),
    "fts_deletion": LineStyle("#d1450b", ">", DASHED),
    "fbss": LineStyle("#4b3bb3", "h", DOTTED),
}
"""Colors after Okabe and Ito, darkened for a white page; related methods share one."""

SPARE_COLORS = ("#5b7f00", "#a0522d", "#006d77", "#b56576", "#525252")


def method_style(method: str) -> LineStyle:
    """Return a method's style; one without an entry always gets the same spare one."""
    if method in METHOD_STYLES:
        return METHOD_STYLES[method]
    number = zlib.crc32(method.encode())
    color = SPARE_COLORS[number % len(SPARE_COLORS)]
    return LineStyle(color, "p8dH"[number // 7 % 4], DOTTED)


def method_name(method: str) -> str:
    """Return what figures and tables call a method."""
    return "dense" if method == "none" else method
