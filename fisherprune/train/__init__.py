"""Prune a network at initialization and train what is left.

``python -m fisherprune.train --help`` on the command line, ``run(TrainConfig(...))``
from Python.
"""

from typing import TYPE_CHECKING

from fisherprune.lazy import lazily

if TYPE_CHECKING:
    from fisherprune.train.steps import Interrupted, run
else:  # at the first use: the command readies its process before torch is imported
    __getattr__, __dir__ = lazily(
        __name__,
        {name: "fisherprune.train.steps" for name in ("Interrupted", "run")},
    )

__all__ = ["Interrupted", "run"]
