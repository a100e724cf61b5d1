"""The passes that criteria need: each is run once, or read from where it was kept."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch

from fisherprune.errors import FieldError, shown
from fisherprune.parameters import device_of
from fisherprune.shards import any_shard, local
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.statistics.passes import (
    PASSES,
    LoopsError,
    ModelStatistics,
    StatisticsPass,
    Task,
    passes_for,
)
from fisherprune.statistics.rank_batches import on_every_rank
from fisherprune.statistics.ranks import copy_first_, gathered, tell
from fisherprune.statistics.settings import PLACES
from fisherprune.statistics.tensor_parallel import copy_replicated_


def statistics_of(
    task: Task,
    needs: Iterable[str],
    *,
    cache: StatisticsCache | None = None,
    key: str = "",
) -> ModelStatistics:
    """Run the passes over the data that criteria need.

    Args:
        task: what the passes work on. Its batches are read once for each pass, so not
            at all where nothing is needed (an iterator that can be read only once is
            held in memory).
        needs: names of registered passes; those that they need are run too.
        cache: where results of passes are looked for, and kept.
        key: a hash of all that they depend on, see ``statistics_key``.

    Raises:
        FisherpruneError: where there is no such pass, a pass can't work on the task, or
            for any reason that it has.
    """
    passes = passes_for(needs)
    several = len(passes) > 1 or any(each.within for each in passes)
    if isinstance(task.batches, Iterator) and several:
        task = replace(task, batches=list(task.batches))
    for each in passes:
        _check_places(each, task)
        each.check(task)
    for each in passes:
        task = replace(task, found=task.found | _on_ranks(each, task, cache, key))
    return task.found


def _on_ranks(
    each: StatisticsPass, task: Task, cache: StatisticsCache | None, key: str
) -> ModelStatistics:
    """Return the result of a pass, over the samples of all ranks."""
    if each.over_ranks:
        found = _result(each, task, cache, key)
    else:
        found = _result(each, on_every_rank(task), cache, key)
        gathered(task, each.name, None)
        every = [local(t) for named in found.parts.values() for t in named.values()]
        copy_first_(task, every)
    for named in found.parts.values():
        copy_replicated_(task, named)
    return found


def _check_places(each: StatisticsPass, task: Task) -> None:
    """Refuse to keep sums elsewhere for a pass that has none."""
    for name in PLACES:
        value = getattr(task.settings, name)
        if value is not None and not each.offloads:
            several = ", ".join(n for n, p in PASSES.items() if p.offloads)
            wanted = f"None for the pass {each.name}; {several} heed it"
            raise FieldError(name, wanted, shown(value))


def _result(
    each: StatisticsPass, task: Task, cache: StatisticsCache | None, key: str
) -> ModelStatistics:
    """Read the result of a pass or run it, or the one that it is within."""
    # With drawn labels, the other would go backward for them, too.
    if each.within and task.settings.labels == "given":
        try:
            # Of shards, plain autograd would need whole gradients of all parameters.
            in_shards = any_shard(task.parameters.values())
            whole = replace(task, may_loop=in_shards)
            return _result(PASSES[each.within], whole, cache, key)
        except LoopsError as error:
            tell(task.process_group, error)
    run = partial(_timed, each, task)
    like = dict.fromkeys(each.yields, task.parameters)
    return cache.get(f"{key}-{each.name}", like, run) if cache else run()


def _timed(each: StatisticsPass, task: Task) -> ModelStatistics:
    start, device = time.perf_counter(), device_of(task.parameters)
    result = each.run(task)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return replace(result, seconds=time.perf_counter() - start)
