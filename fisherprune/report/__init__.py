"""Tables and figures of a study, from the folders of its runs.

``python -m fisherprune.report RESULTS`` on the command line, ``write_report`` from
Python.
"""

from fisherprune.report.pages.content import Report
from fisherprune.report.write import write_report

__all__ = ["Report", "write_report"]
