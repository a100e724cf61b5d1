"""The directive ``criteria``: a table of all criteria, from the criteria themselves."""

import inspect

from docutils import nodes
from docutils.parsers.rst import Parser
from docutils.utils import new_document
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import fisherprune
from fisherprune.scoring.criteria import Criterion, get_criterion

STATISTICS = {
    "gradient": "mean gradient",
    "moments": "gradient moments",
    "hessian": "Hessian-gradient product",
    "gauss_newton": "Gauss-Newton diagonal",
    "hutchinson": "Hutchinson's diagonal",
    "synaptic_flow": "synaptic flow",
    "meta_gradient": "meta-gradient",
    "ntk_sap": "tangent kernel's derivative",
}


def setup(app: Sphinx) -> dict:
    """Add the directive."""
    app.add_directive("criteria", CriteriaTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class CriteriaTable(SphinxDirective):
    """One row for each criterion, and below the table what its docstring says."""

    def run(self) -> list[nodes.Node]:
        """Return table and texts, parsed as docstrings are written."""
        document = new_document("criteria", self.state.document.settings)
        Parser().parse("\n".join([*table(), *texts()]), document)
        return document.children


def found() -> list[Criterion]:
    """Return the criteria that are registered."""
    return [get_criterion(code) for code in fisherprune.criteria()]


def table() -> list[str]:
    """Return the lines of the table."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 22 36 32 10", ""]
    rows = [("Criterion", "Score", "Statistics it needs", "Rounds")]
    for each in found():
        needs = ", ".join(STATISTICS.get(n, n) for n in sorted(each.needs))
        score = each.summary.partition(". ")[0].rstrip(".")
        rows.append((f"``{each.code}``", score, needs or "no data", str(each.rounds)))
    for first, *others in rows:
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
    return [*lines, ""]


def texts() -> list[str]:
    """Return the lines of a list of definitions."""
    lines = []
    for each in found():
        text = inspect.getdoc(each.score) or ""
        lines += [f"``{each.code}``", *(f"   {line}" for line in text.splitlines()), ""]
    return lines
