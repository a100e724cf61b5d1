"""Squares of gradients for labels that are drawn from the model."""

from __future__ import annotations

from collections.abc import Sequence

from fisherprune.statistics.accumulators import Sums
from fisherprune.statistics.driver import LoneSample, TappedBatch
from fisherprune.statistics.passes import Task
from fisherprune.statistics.ranks import own_name
from fisherprune.statistics.sample_streams import SampleStreams
from fisherprune.statistics.scale import scaled
from fisherprune.statistics.sums import PerSampleSums
from fisherprune.streams import stream_seed


def sums_of_draws(task: Task) -> int:
    """Return how many sums there are for drawn labels."""
    return (task.settings.draws or 1) if task.group_size > 1 else 1


class SampledSums(PerSampleSums):
    """Means for given labels, squares for drawn ones.

    Groups run on across batches, so each draw has sums of its own, unless all groups
    are of one sample.
    """

    def __init__(self, task: Task, group_size: int, scaled: bool) -> None:
        self.draws, self.of_draws = task.settings.draws or 1, sums_of_draws(task)
        super().__init__(task, group_size, scaled, 1 + self.of_draws)

    def add_drawn(
        self, each: TappedBatch | LoneSample, task: Task, exponent: int
    ) -> None:
        """Go backward from the outputs, once for each draw of labels."""
        seed = stream_seed(task.seed, own_name("labels", task.process_group))
        likelihood = each.ran.likelihood
        for draw in range(self.draws):
            self.choose(1 + draw % self.of_draws)
            numbers = SampleStreams(seed, each.first, draw)
            gradient = likelihood.drawn_gradient(numbers)
            loss = (likelihood.outputs.float() * gradient).sum()
            each.backward(scaled(loss, exponent), again=draw < self.draws - 1)

    def joined(self, every: Sequence[tuple[Sums, Sums]]) -> tuple[Sums, Sums]:
        """Return the sums of means, and the sums of squares in the mean over draws."""
        (means, _), (_, total), *others = every
        for name, squares in total.items():
            for _, more in others:
                squares += more[name]
            squares /= self.draws
        return means, total
