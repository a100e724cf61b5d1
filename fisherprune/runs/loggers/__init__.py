"""Loggers: where the metrics of a run are shown besides its own files; a file each."""

from fisherprune.runs.loggers.logger import Logger
from fisherprune.runs.loggers.tensorboard import TensorBoard
from fisherprune.runs.loggers.trackio import Trackio
from fisherprune.runs.loggers.wandb import WandB

LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""By the name that option ``log`` takes."""

__all__ = ["LOGGERS", "Logger"]
