"""What a run does, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fisherprune import models
from fisherprune.baselines import reinitialize_
from fisherprune.errors import FisherpruneError
from fisherprune.files import check_writable
from fisherprune.parameters import prunable_parameters
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.device import device_name, resolve_device
from fisherprune.runs.environment import environment
from fisherprune.runs.folder import CHECKPOINT, RESULTS, RunFolder
from fisherprune.runs.identity import identity
from fisherprune.runs.loggers import LOGGERS
from fisherprune.runs.metrics import Metrics
from fisherprune.runs.result import RunResult, ScoringCost, check_pruned_are_zero
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.streams import stream, stream_seed
from fisherprune.train.checkpoint import Checkpoint, State, misfit
from fisherprune.train.clock import Clock
from fisherprune.train.images import Images, load_images
from fisherprune.train.masking import make_masks, warm_up_batchnorm
from fisherprune.train.network import check_mask, network
from fisherprune.train.subnetwork import subnetwork_of
from fisherprune.train.trainer import Trainer, deterministic_convolutions, evaluate


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run, which can go on in ``folder``."""

    def __init__(self, folder: Path) -> None:
        again = f"python -m fisherprune.train --resume {folder}"
        super().__init__(f"interrupted; {again} goes on")
        self.folder = folder


def run(
    config: TrainConfig,
    *,
    folder: Path | None = None,
    statistics: Path | StatisticsCache | None = None,
    quiet: bool = False,
    checkpointed: Callable[[], None] | None = None,
) -> RunResult:
    """Make a mask, train under it, test; write everything into the run's own folder.

    Warm-up epochs come first and keep the first learning rate; ``epochs`` and the drops
    are counted from the mask on. The optimizer goes on through the mask, under which
    its state is zero. Nothing depends on global random state, nor is it changed.

    After every epoch, and when the mask is made, the whole state is written to
    ``checkpoint.pt`` in the folder. A run that was ended, at whatever moment, goes on
    from there and ends in the same bits as one that was not, on the same device.

    Args:
        config: what to do.
        folder: of the run; None makes a new one in the config's ``output_dir``. Where
            it holds an unfinished run of the same identity, that run is resumed.
        statistics: folder where the statistics that scores are made of are kept for
            other runs, or the cache itself, which can have a lock; None keeps none.
        quiet: show no progress.
        checkpointed: called after each checkpoint was written; may raise, to stop.

    Raises:
        FisherpruneError: for what only the machine or the data can tell: no such
            device, no data, more samples asked for than there are, a folder that can't
            be written to or is not of this run, a damaged checkpoint, a loss that is no
            longer finite.
        OSError: where a file can't be written, a full disk say; names the file.
        Interrupted: on Ctrl-C, once the folder is there.
    """
    device = resolve_device(config.device)
    for name in config.loggers:
        LOGGERS[name].require()
    with ExitStack() as opened:
        place = None
        if folder is not None:
            place = opened.enter_context(RunFolder(config, folder))
        else:
            check_writable(Path(config.output_dir))
        clock = Clock()
        images = load_images(config, config.score_samples, device, quiet)
        model = network(config, images.train)
        check_mask(config, model)
        place = place or opened.enter_context(RunFolder(config))
        checkpoint = Checkpoint(
            place.path / CHECKPOINT,
            identity(config),
            background=device.type == "cuda",
            written=checkpointed,
        )
        opened.callback(checkpoint.close)
        opened.enter_context(explained(place.path))
        opened.enter_context(deterministic_convolutions())
        steps = Steps(config, images, model, place, checkpoint, clock, quiet)
        return steps.go(statistics)


class Steps:
    """The steps of a run, each of which leaves out what a checkpoint says is done."""

    def __init__(
        self,
        config: TrainConfig,
        images: Images,
        model: nn.Module,
        folder: RunFolder,
        checkpoint: Checkpoint,
        clock: Clock,
        quiet: bool,
    ) -> None:
        """Begin with the new network, or as the checkpoint says."""
        self.config, self.images, self.folder = config, images, folder
        self.model = model
        self.checkpoint, self.clock, self.quiet = checkpoint, clock, quiet
        self.device = images.train.images.device
        self.devices = [device_name(self.device)]
        self.scoring: ScoringCost | None = None
        self.best_sha256: str | None = None
        """Of the file of the best weights, which is written after the checkpoint."""
        self.trainer = Trainer(config, model, images, folder, quiet)
        self.restore()
        self.clock.lap("data")

    def go(self, statistics: Path | StatisticsCache | None) -> RunResult:
        """Warm up, make the mask, train, test."""
        self.trainer.warm_up(lambda: self.save("warmup"))
        self.prune(statistics)
        self.trainer.train(lambda: self.save("training"))
        self.checkpoint.wait()
        self.folder.save_weights("last", self.model.state_dict())
        if self.best_sha256 is None:
            self._save_best({"model": self.model.state_dict()})
        self.clock.lap("training")
        result = self.test()
        self.folder.write_json(RESULTS, result.as_json())
        self.checkpoint.remove()
        return result

    def prune(self, statistics: Path | StatisticsCache | None) -> None:
        """Make the mask and hold it from here on."""
        config, trainer, images = self.config, self.trainer, self.images
        if config.method == "none" or trainer.masks is not None:
            return
        self.model.to(memory_format=torch.contiguous_format)  # no score depends on it
        if config.bn_warmup:
            size, seed = config.training_batch_size, config.seed
            warm_up_batchnorm(self.model, images.train, size, seed, self.quiet)
        masks, self.scoring = make_masks(
            config, self.model, images.scoring, statistics, self.quiet
        )
        if config.reinitialize:
            seed = stream_seed(config.seed, "reinitialization")
            reinitialize_(self.model, trainer.optimizer, seed=seed)
            models.initialize_(self.model, config.init, stream(config.seed, "reinit"))
        trainer.prune(masks)
        self.folder.save_masks(masks)
        self.save("scoring")

    def test(self) -> RunResult:
        """Measure the last and the best weights on the test images."""
        config, trainer, model = self.config, self.trainer, self.model
        images = self.images.test
        model.to(memory_format=torch.contiguous_format)  # as whoever loads the weights
        image = images.normalize(images.images[:1])
        prunable = prunable_parameters(model, config.skip)
        left = subnetwork_of(model, image, prunable, trainer.masks)
        last = best = self.measure("last", model.state_dict())
        if trainer.best_epoch != config.epochs:
            best = self.measure("best", self._best_weights())
        self.clock.lap("testing")
        return RunResult(
            config=config,
            folder=self.folder.path,
            parameters=sum(p.numel() for p in model.parameters()),
            last=last,
            best=best,
            best_epoch=trainer.best_epoch,
            layers=left.layers,
            scoring=self.scoring,
            seconds=self.clock.laps,
            environment=environment(self.device),
            notes=(*self.notes(), *left.notes),
            flops=left.flops,
        )

    def measure(self, which: str, weights: dict[str, Tensor]) -> Metrics:
        """Measure weights on the test images.

        Raises:
            FisherpruneError: where a weight or the loss is not finite.
        """
        if self.trainer.masks is not None:
            check_pruned_are_zero(weights, self.trainer.masks)
        odd = [name for name, weight in weights.items() if not weight.isfinite().all()]
        self.model.load_state_dict(weights)
        found = evaluate(self.model, self.images.test, f"test, {which}", self.quiet)
        if odd or not math.isfinite(found.loss):
            what = f"the {which} weights" if odd else f"the loss of the {which} weights"
            got = f"NaN or infinity in {odd[0]}" if odd else found.loss
            raise FisherpruneError(
                f"testing: {what} must be finite, got {got}; {self.folder.diverged}"
            )
        return found

    def notes(self) -> tuple[str, ...]:
        """Say where devices have changed on the way."""
        if len(self.devices) == 1:
            return ()
        return (f"trained on {', then '.join(self.devices)}: no device repeats it",)

    def save(self, phase: str) -> None:
        """Write a checkpoint, and then the best weights if these are they."""
        self.checkpoint.wait()  # until the best weights of the one before have a hash
        self.clock.lap(phase)
        state = self.trainer.state() | {
            "laps": self.clock.laps,
            "devices": self.devices,
            "scoring": self.scoring,
            "best_sha256": self.best_sha256,
        }
        self.checkpoint.save(state, self._save_best if self.trainer.is_best else None)

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        state = self.checkpoint.load()
        if state is None:
            return
        self._restore_trainer(state)
        self.clock.laps, self.scoring = state["laps"], state["scoring"]
        self.best_sha256 = state["best_sha256"]
        if state["devices"][-1:] != self.devices:
            self.devices = [*state["devices"], *self.devices]
        else:
            self.devices = state["devices"]
        if self.trainer.masks is not None:  # whatever has become of the file
            self.folder.save_masks(self.trainer.masks)
        if self.trainer.is_best:  # ended before they were written
            self._save_best(state)
        elif self.trainer.best_epoch > 0:  # before the rest is trained in vain
            self._best_weights()

    def _restore_trainer(self, state: State) -> None:
        """Restore the trainer from a state that is this run's.

        Raises:
            FisherpruneError: where the state has another form, or values of another
                model or training.
        """
        form = self.trainer.form() | {
            "run": str,
            "laps": self.clock.laps,
            "devices": [str],
            "scoring": (None, {"seconds": float, "samples": int, "cached": bool}),
            "best_sha256": (None, str),
        }
        if place := misfit(state, form):
            raise self.checkpoint.unfit(f"another {place}")
        try:
            self.trainer.restore(state)
        except (RuntimeError, ValueError) as error:
            raise self.checkpoint.unfit(f"other values: {error}") from error

    def _best_weights(self) -> dict[str, Tensor]:
        return self.folder.load_weights("best", self.best_sha256)

    def _save_best(self, state: State) -> None:
        """Write the best weights: after the checkpoint, so never ahead of it."""
        self.best_sha256 = self.folder.save_weights("best", state["model"])


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say how a run goes on after Ctrl-C, and that torch.compile can't work here."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(folder) from None
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).partition("\n")[0]
        raise FisherpruneError(
            f"compile: torch.compile must work on this machine, but {reason}; leave "
            "the option out"
        ) from error
