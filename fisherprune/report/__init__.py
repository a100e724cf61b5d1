"""Tables and figures of a study, from the folders of its runs.

``python -m fisherprune.report RESULTS`` on the command line, ``write_report`` from
Python.
"""

from typing import TYPE_CHECKING

from fisherprune.lazy import lazily

if TYPE_CHECKING:
    from fisherprune.report.pages.content import Report
    from fisherprune.report.write import write_report
else:  # at the first use: the command readies its process before torch is imported
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Report": "fisherprune.report.pages.content",
            "write_report": "fisherprune.report.write",
        },
    )

__all__ = ["Report", "write_report"]
