"""Prune a network at initialization and train what is left.

``python -m fisherprune.train --help`` on the command line, ``run(TrainConfig(...))``
from Python.
"""

from fisherprune.train.steps import Interrupted, run

__all__ = ["Interrupted", "run"]
