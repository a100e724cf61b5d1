"""What a run does, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fisherprune import models
from fisherprune.baselines import reinitialize_
from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.files import check_writable
from fisherprune.parameters import prunable_parameters
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.device import device_name, rank_device, resolve_device
from fisherprune.runs.environment import environment
from fisherprune.runs.folder import CHECKPOINT, RESULTS, FollowedFolder, RunFolder
from fisherprune.runs.identity import identity
from fisherprune.runs.loggers import LOGGERS
from fisherprune.runs.metrics import Metrics
from fisherprune.runs.result import RunResult, ScoringCost, check_pruned_are_zero
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.streams import stream, stream_seed
from fisherprune.train.checkpoint import Checkpoint, State, misfit
from fisherprune.train.clock import Clock
from fisherprune.train.images import Images, load_images
from fisherprune.train.launch import launched
from fisherprune.train.masking import make_masks, warm_up_batchnorm
from fisherprune.train.network import check_mask, network
from fisherprune.train.ranks import ALONE, Job, Ranks, job_here, joined
from fisherprune.train.subnetwork import subnetwork_of
from fisherprune.train.trainer import Trainer, deterministic_convolutions, evaluate


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run, which can go on in ``folder``."""

    def __init__(self, folder: Path) -> None:
        again = f"python -m fisherprune.train --resume {folder}"
        super().__init__(f"interrupted; {again} goes on")
        self.folder = folder

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.folder,)


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

    Several processes do a run together: under torchrun its ranks, which must be as many
    as the config says, but where a run is resumed; else this process starts them (by
    ``multiprocessing``: a script's main part must be guarded) and waits. Each scores
    and trains on its share of every batch. Gradients are added up and BatchNorm
    normalizes by the whole batch, so the run is that of one process up to rounding, and
    the same in each bit for as many processes on the same devices. What draws random
    numbers for samples (drawn labels, dropout) draws others, and other layers that mix
    samples, of a user's model, mix those of a rank. The first rank alone writes, prints
    and tests; every rank returns the result.

    Args:
        config: what to do.
        folder: of the run; None makes a new one in the config's ``output_dir``. Where
            it holds an unfinished run of the same identity, that run is resumed.
        statistics: folder where the statistics that scores are made of are kept for
            other runs, or the cache itself, which can have a lock; None keeps none, nor
            do several processes.
        quiet: show no progress.
        checkpointed: called after each checkpoint was written; may raise, to stop. It
            must be picklable where processes are started.

    Raises:
        FisherpruneError: for what only the machine or the data can tell: no such
            device, no data, more samples asked for than there are, a folder that can't
            be written to or is not of this run, a damaged checkpoint, a loss that is no
            longer finite.
        OSError: where a file can't be written, a full disk say; names the file.
        Interrupted: on Ctrl-C, once the folder is there.
    """
    job = job_here()
    if job is None and config.processes > 1:
        work = partial(
            run, config, folder=folder, quiet=quiet, checkpointed=checkpointed
        )
        return launched(work, config.processes)
    device = _device(config, job, resumed=folder is not None)
    with ExitStack() as opened:
        ranks = opened.enter_context(joined(job, device))
        quiet = quiet or not ranks.first
        place = None
        ranks.from_first(partial(_check_place, config, folder))
        if folder is not None:
            place = opened.enter_context(_run_folder(ranks, config, folder))
        clock = Clock()
        images = ranks.in_turn(
            lambda: load_images(config, config.score_samples, device, quiet)
        )
        model = ranks.in_turn(lambda: _checked_network(config, images))
        place = place or opened.enter_context(_run_folder(ranks, config))
        checkpoint = Checkpoint(
            place.path / CHECKPOINT,
            identity(config),
            background=device.type == "cuda" and ranks.first,
            written=checkpointed,
        )
        opened.callback(checkpoint.close)
        opened.enter_context(explained(place.path))
        opened.enter_context(deterministic_convolutions())
        steps = Steps(config, images, model, place, checkpoint, clock, quiet, ranks)
        return steps.go(statistics)


def _device(config: TrainConfig, job: Job | None, resumed: bool) -> torch.device:
    """Return the device of this process, where the job is one for the run.

    Raises:
        FisherpruneError: where the job has another number of ranks than a new run, or
            one that the run can't have, or there is no such device.
    """
    if job is None:
        return resolve_device(config.device)
    if job.size != config.processes:
        if not resumed:
            wanted = f"{job.size}, the number of ranks of this job"
            raise FieldError("processes", wanted, config.processes)
        replace(config, processes=job.size)
    if job.size == 1:
        return resolve_device(config.device)
    return rank_device(config.device, job.local)


def _check_place(config: TrainConfig, folder: Path | None) -> None:
    for name in config.loggers:
        LOGGERS[name].require()
    if folder is None:
        check_writable(Path(config.output_dir))


def _run_folder(
    ranks: Ranks, config: TrainConfig, path: Path | None = None
) -> RunFolder:
    """Return the folder of a run, into which the first rank alone writes."""
    own: list[RunFolder] = []

    def make() -> Path:
        own.append(RunFolder(config, path))
        return own[0].path

    found = ranks.from_first(make)
    return own[0] if own else FollowedFolder(found)


def _checked_network(config: TrainConfig, images: Images) -> nn.Module:
    model = network(config, images.train)
    check_mask(config, model)
    return model


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
        ranks: Ranks = ALONE,
    ) -> None:
        """Begin with the new network, or as the checkpoint says."""
        self.ranks = ranks
        self.config, self.images, self.folder = config, images, folder
        self.model = model
        self.checkpoint, self.clock, self.quiet = checkpoint, clock, quiet
        self.device = images.train.images.device
        several = f"{ranks.size} x " if ranks.size > 1 else ""
        self.devices = [f"{several}{device_name(self.device)}"]
        self.scoring: ScoringCost | None = None
        self.best_sha256: str | None = None
        """Of the file of the best weights, which is written after the checkpoint."""
        self.trainer = Trainer(config, model, images, folder, quiet, ranks)
        state = ranks.from_first(checkpoint.load)
        if state is not None:
            ranks.in_turn(partial(self.restore, state))
        self.clock.lap("data")

    def go(self, statistics: Path | StatisticsCache | None) -> RunResult:
        """Warm up, make the mask, train, test."""
        self.trainer.warm_up(lambda: self.save("warmup"))
        self.prune(statistics)
        self.trainer.train(lambda: self.save("training"))
        return self.ranks.from_first(self.finish)

    def finish(self) -> RunResult:
        """Write the weights, test, write the result."""
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
        what = config, self.model, images.scoring, statistics, self.quiet, self.ranks
        with self.ranks.scoring():
            masks, self.scoring = make_masks(*what)
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
            environment={**environment(self.device), "processes": self.ranks.size},
            notes=(*self.notes(), *left.notes),
            flops=left.flops,
            execution=trainer.execution,
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
        weights = self.model.state_dict().values()
        self.ranks.check_same("the sums of the model's tensors", weights)
        if not self.ranks.first:
            return
        self.checkpoint.wait()  # until the best weights of the one before have a hash
        self.clock.lap(phase)
        state = self.trainer.state() | {
            "laps": self.clock.laps,
            "devices": self.devices,
            "scoring": self.scoring,
            "best_sha256": self.best_sha256,
        }
        self.checkpoint.save(state, self._save_best if self.trainer.is_best else None)

    def restore(self, state: State) -> None:
        """Go on from the state of a checkpoint."""
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
