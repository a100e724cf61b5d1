"""Runs as tasks of a Ray cluster: a GPU for each process, a fraction of one, or none.

A run of several processes is one task, on one machine, that starts them itself.

Each worker writes into the same results folder, which all machines of the cluster must
see under the same path. The driver gives a run to one worker. The lock that the worker
holds meanwhile guards against other processes of its machine, not of others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from fisherprune.errors import FisherpruneError
from fisherprune.experiments import store
from fisherprune.experiments.execute import End, Options, Outcome, attempt
from fisherprune.experiments.store import StudyRun
from fisherprune.packages import required

GRACE = 10.0
"""Seconds that a cancelled run has to end by itself before it is cancelled again."""
ATTEMPTS = 3
"""How often: an interrupt is lost where it meets Python in a destructor."""
SLICE = 1.0
"""Seconds after which a wait for the cluster returns, so that files are looked at."""


def import_ray() -> ModuleType:
    """Return the module ``ray``.

    Raises:
        FisherpruneError: where it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    remedy = "pip install 'fisherprune[ray]'"
    return required("ray", "--executor ray needs Ray", remedy)


class Ray:
    """An ``Executor`` on the Ray cluster of RAY_ADDRESS, or on one it starts here."""

    def __init__(
        self, options: Options, gpus: float | None = None, cpus: float | None = None
    ) -> None:
        """Connect.

        Args:
            options: of all runs.
            gpus: of each run; None is one for each of its processes where the cluster
                has any, else 0.
            cpus: of each run; None is one for each of its processes.

        Raises:
            FisherpruneError: where Ray is missing, or no machine of the cluster has
                what a run of one process needs.
        """
        self.ray = import_ray()
        self._owned = not self.ray.is_initialized()
        if self._owned:
            self.ray.init(include_dashboard=False, logging_level="error")
        has_gpus = bool(self.ray.cluster_resources().get("GPU"))
        self.options, self.each = options, Needs(gpus, cpus, has_gpus)
        self._refs: dict[Any, StudyRun] = {}
        self._refused: list[tuple[StudyRun, Outcome]] = []
        self._processes = 1
        if not self._slots(1):
            self.close()
            raise FisherpruneError(self._lack(1))

    def _slots(self, processes: int) -> int:
        """Return how many runs of so many processes fit on the cluster at a time."""
        slots, needs = 0, self.each.of(processes)
        for node in self.ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                slots += fitting(has.get("CPU", 0), has.get("GPU", 0), *needs)
        return slots

    def _lack(self, processes: int) -> str:
        cpus, gpus = self.each.of(processes)
        return (
            f"--executor ray: a machine of the cluster must have the {cpus:g} CPUs "
            f"and {gpus:g} GPUs of a run, none has"
        )

    def free(self) -> bool:
        """Return whether another run can be submitted, if it is as the last one."""
        return len(self._refs) < self._slots(self._processes)

    def running(self) -> list[StudyRun]:
        """Return the runs that are submitted and have not ended."""
        return list(self._refs.values())

    def submit(self, run: StudyRun) -> None:
        """Send a run to the cluster; it fails where no machine can ever hold it."""
        processes = run.config.processes
        if not self._slots(processes):
            error = FisherpruneError(self._lack(processes))
            text = store.write_failure(run, error)
            self._refused.append((run, Outcome(End.FAILED, text)))
            return
        self._processes = processes
        cpus, gpus = self.each.of(processes)
        task = self.ray.remote(_on_worker)
        task = task.options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
        self._refs[task.remote(run, self.options, os.getcwd())] = run

    def wait(self) -> list[tuple[StudyRun, Outcome]]:
        """Return what ended since the last call; waits a while where runs go on."""
        if self._refused or not self._refs:
            refused, self._refused = self._refused, []
            return refused
        ended, _ = self.ray.wait(
            list(self._refs), num_returns=len(self._refs), timeout=SLICE
        )
        taken = [(ref, self._refs.pop(ref)) for ref in ended]
        return [(run, self._outcome(ref, run)) for ref, run in taken]

    def _outcome(self, ref: Any, run: StudyRun) -> Outcome:
        try:
            return self.ray.get(ref)
        except Exception as error:  # the worker's end, not the run's: see attempt
            return Outcome(End.FAILED, store.write_failure(run, error))

    def close(self) -> None:
        """Cancel what is running, let it release its locks, disconnect."""
        left = list(self._refs)
        for _ in range(ATTEMPTS):
            for ref in left:
                self.ray.cancel(ref)
            if left:
                _, left = self.ray.wait(left, num_returns=len(left), timeout=GRACE)
        for ref in left:
            self.ray.cancel(ref, force=True)
        self._refs.clear()
        if self._owned:
            self.ray.shutdown()


@dataclass(frozen=True)
class Needs:
    """What a run is given, as far as it is said, and what its processes need."""

    gpus: float | None
    cpus: float | None
    has_gpus: bool
    """Whether the cluster has any."""

    def of(self, processes: int) -> tuple[float, float]:
        """Return CPUs and GPUs of a run of so many processes."""
        gpus = processes if self.has_gpus else 0
        return (
            processes if self.cpus is None else self.cpus,
            gpus if self.gpus is None else self.gpus,
        )


def fitting(cpus: float, gpus: float, each_cpus: float, each_gpus: float) -> int:
    """Return how many runs fit on a machine; parts of GPUs do not add up to one."""
    by_cpu = int(cpus / each_cpus)
    if not each_gpus:
        return by_cpu
    parts = int(1 / each_gpus) if each_gpus <= 1 else 1 / each_gpus
    return min(by_cpu, int(gpus * parts))


def _on_worker(run: StudyRun, options: Options, folder: str) -> Outcome:
    """Do a run on whatever machine this is, as if in the driver's folder."""
    if Path(folder).is_dir():
        os.chdir(folder)
    if not run.results.is_dir():
        raise FisherpruneError(
            f"{run.results}: the results folder must be on a disk that every machine "
            "of the cluster sees under the same path"
        )
    device = run.config.device
    if device.startswith("cuda"):  # Ray shows the worker its own GPU alone
        run = replace(run, config=replace(run.config, device="cuda"))
    return attempt(run, options)
