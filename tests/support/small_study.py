"""A study of three runs whose training is made up: results are there at once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import result_trees as trees
import torch

from fisherprune.experiments import store
from fisherprune.runs.device import device_name

STUDY = """
name = "small"
[run]
dataset = "digits"
epochs = 4
[grid]
method = ["none", "snip", "fts"]
"""


@dataclass
class Trained:
    """Stands in for fisherprune.train.run: writes a result at once."""

    done: list
    before: dict
    """What happens first, by method."""
    seconds: float = 6.0

    def run(self, config, *, folder, statistics, quiet):
        assert statistics is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(config)))
        self.before.get(config.method, lambda _: None)(folder)
        for name in store.WEIGHTS:
            (folder / name).touch()
        write_result(folder, config, self.seconds)
        self.done.append(config.method)
        return SimpleNamespace(best=SimpleNamespace(accuracy=0.5))


def write_result(folder, config, seconds=6.0):
    """Write the result of a run on this machine."""
    device = {"device": device_name(torch.device("cpu"))}
    times = {"training": seconds}
    content = trees.result(config, 0.5, seconds=times, environment=device)
    trees.write(folder / "results.json", content)


def fail(error):
    """Return something to happen that fails."""

    def failing(*_):
        raise error

    return failing
