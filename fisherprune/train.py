"""Prune a network at initialization and train what is left.

``python -m fisherprune.train --help`` on the command line, ``run(TrainConfig(...))``
from Python. Below, from top to bottom: what a run does, its steps, the command line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fisherprune import cli, models
from fisherprune.baselines import reinitialize_
from fisherprune.config import TrainConfig, resolve_device
from fisherprune.errors import FisherpruneError
from fisherprune.layers import prunable_parameters
from fisherprune.parts import load_parts
from fisherprune.runs import RunFolder, check_writable, environment
from fisherprune.scoring import make_masks
from fisherprune.streams import stream_seed
from fisherprune.summary import (
    RunResult,
    check_pruned_are_zero,
    count_layers,
    table,
)
from fisherprune.trainer import Trainer, evaluate


def run(
    config: TrainConfig, *, statistics: Path | None = None, quiet: bool = False
) -> RunResult:
    """Make a mask, train under it, test; write everything into the run's own folder.

    Warm-up epochs come first and keep the first learning rate; ``epochs`` and the drops
    are counted from the mask on. The optimizer goes on through the mask, under which
    its state is zero. Nothing depends on global random state, nor is it changed.

    Args:
        config: what to do.
        statistics: folder of statistics that runs share, made if missing; None: none.
        quiet: show no progress.

    Raises:
        FisherpruneError: for what only the machine or the data can tell: no such
            device, no data, more samples asked for than there are, a folder that can't
            be written to, a loss that is no longer finite.
    """
    device = resolve_device(config.device)
    check_writable(Path(config.output_dir))
    clock = Clock()
    parts = load_parts(config, device, quiet)
    model = models.create(
        config.model,
        len(parts.train.classes),
        parts.train.channels,
        seed=stream_seed(config.seed, "initialization"),
    ).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    folder = RunFolder(config)
    clock.lap("data")

    trainer = Trainer(config, model, optimizer, parts, folder, quiet)
    for _ in range(config.warmup_epochs):
        trainer.epoch("warmup")
    clock.lap("warmup")

    masks = scoring = None
    if config.method != "none":
        masks, scoring = make_masks(config, model, parts, statistics, quiet)
        if config.reinitialize:
            seed = stream_seed(config.seed, "reinitialization")
            reinitialize_(model, optimizer, seed=seed)
        masks.apply_(model)
        masks.hold(model, optimizer)
        folder.save_masks(masks)
    clock.lap("scoring")

    trainer.train()
    folder.save_weights("last", model)
    clock.lap("training")

    if masks is not None:
        check_pruned_are_zero(model, masks)
    layers = count_layers(prunable_parameters(model, config.skip), masks)
    last = best = evaluate(model, parts.test, "test, last", quiet)
    if trainer.best_epoch != config.epochs:
        model.load_state_dict(folder.load_weights("best"))
        best = evaluate(model, parts.test, "test, best", quiet)
    clock.lap("testing")
    result = RunResult(
        config=config,
        folder=folder.path,
        parameters=sum(p.numel() for p in model.parameters()),
        last=last,
        best=best,
        best_epoch=trainer.best_epoch,
        layers=layers,
        scoring=scoring,
        seconds=clock.laps,
        environment=environment(device),
    )
    folder.write_json("results.json", result.as_json())
    return result


class Clock:
    """Wall time of the phases of a run, in seconds."""

    def __init__(self) -> None:
        """Start."""
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the phase ``name``."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    0 after a whole run, 2 for a mistake of the user's (one line on stderr), 130 after
    Ctrl-C.
    """
    try:
        config, quiet = cli.parse(argv)
        print(table(run(config, quiet=quiet)))
        return 0
    except KeyboardInterrupt:
        print("fisherprune.train: interrupted", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        reason = f"{error}".splitlines()[0]
        hint = "a smaller --batch-size or --score-batch-size needs less memory"
        return _fail(f"{reason}; {hint}")
    except (FisherpruneError, OSError) as error:
        return _fail(str(error))


def _fail(reason: str) -> int:
    print(f"fisherprune.train: error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
