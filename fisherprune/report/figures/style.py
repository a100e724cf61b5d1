"""One look for all figures: a method keeps its colour, line and marker everywhere."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

RC = {
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
}
"""Settings of matplotlib while a figure is drawn."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    color: str
    marker: str
    line: str | tuple

    @property
    def size(self) -> float:
        """Of the marker: pointed ones must be larger to look alike."""
        return {"*": 9.5, "P": 7, "X": 6.8, "h": 6.5, "D": 5}.get(self.marker, 5.8)


SOLID, DASHED, DOTTED = "-", (0, (5, 1.6)), (0, (1.2, 1.4))

LOOKS = {
    "none": Look("#111111", "", DASHED),
    "random": Look("#8a8a8a", "o", SOLID),
    "magnitude": Look("#d98e00", "s", SOLID),
    "grad_norm": Look("#3fa7e0", "^", SOLID),
    "snip": Look("#0b5fa5", "D", SOLID),
    "grasp": Look("#00875f", "v", SOLID),
    "grasp_reversed": Look("#00875f", "<", DASHED),
    "fisher_diag": Look("#c9659a", "P", SOLID),
    "fisher_pruner": Look("#7a1f4f", "X", SOLID),
    "obd": Look("#7a1f4f", "p", DASHED),
    "fts": Look("#d1450b", "*", SOLID),
    "fts_deletion": Look("#d1450b", ">", DASHED),
    "fbss": Look("#4b3bb3", "h", DOTTED),
}
"""Colours after Okabe and Ito, darkened for white ground; kin share a colour."""

SPARE = ("#5b7f00", "#a0522d", "#006d77", "#b56576", "#525252")


def look(method: str) -> Look:
    """Return a method's look; one without an entry always gets the same spare one."""
    if method in LOOKS:
        return LOOKS[method]
    number = zlib.crc32(method.encode())
    return Look(SPARE[number % len(SPARE)], "p8dH"[number // 7 % 4], DOTTED)


def name(method: str) -> str:
    """Return what figures and tables call a method."""
    return "dense" if method == "none" else method
