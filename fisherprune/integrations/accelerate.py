"""Pruning in loops under Hugging Face's Accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fisherprune.errors import FieldError, shown
from fisherprune.integrations.holding import Holding, Loop, each_sample_once, library
from fisherprune.masks.masks import Masks
from fisherprune.statistics.batches import Batches


class Pruning(Holding):
    """Prunes a prepared model as ``fisherprune.prune`` does, and holds the masks.

    ``accelerator.save_state`` saves the masks; ``accelerator.load_state`` holds those
    that it loads, or ends the hold where the state was saved before the pruning.

    Args:
        accelerator: that has prepared what follows.
        model: as ``accelerator.prepare`` returned it.
        optimizer: that trains it, prepared too, or several of them.

    Attributes:
        masks: None before the model is pruned.

    Raises:
        FisherpruneError: where ``accelerator`` is none.

    Example:
        >>> import accelerate, torch
        >>> accelerator = accelerate.Accelerator(cpu=True)
        >>> net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 3))
        >>> data = [(torch.randn(5), i % 3) for i in range(16)]
        >>> net, optimizer, loader = accelerator.prepare(
        ...     net,
        ...     torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
        ...     torch.utils.data.DataLoader(data, 4),
        ... )
        >>> pruning = Pruning(accelerator, net, optimizer)
        >>> pruning.prune(loader, "fts", sparsity=0.9)
        Masks(1 parameters, 4 of 40 weights kept)
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     accelerator.backward(torch.nn.functional.cross_entropy(net(x), y))
        ...     optimizer.step()
        >>> int(torch.count_nonzero(net[0].weight))
        4
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
    ) -> None:
        if not isinstance(accelerator, library("accelerate", "accelerate").Accelerator):
            raise FieldError(
                "accelerator", "an accelerate.Accelerator", shown(accelerator)
            )
        self._loop = Loop(
            accelerator.unwrap_model(model),
            [optimizer] if isinstance(optimizer, Optimizer) else optimizer,
            ranks=accelerator.num_processes,
            broadcasts=getattr(model, "broadcast_buffers", False),
        )
        accelerator.register_for_checkpointing(self)
        # The hold would set weights to zero while they are loaded.
        accelerator.register_load_state_pre_hook(lambda *_: self.remove())

    def prune(
        self,
        batches: Batches,
        criterion: str = "fts",
        sparsity: float = 0.9,
        scope: str = "global",
        **options: Any,
    ) -> Masks:
        """Find the masks and hold them from now on, in place of earlier ones.

        Args:
            batches: a prepared dataloader, of which each process scores its share, or
                others; the loader's next epoch is what it would have been.
            criterion: as in ``fisherprune.prune``.
            sparsity: as in ``fisherprune.prune``.
            scope: as in ``fisherprune.prune``.
            options: any others of ``fisherprune.prune``; ``process_group`` is that of
                all processes by default.

        Returns:
            The masks, the same in all processes.

        Raises:
            FisherpruneError: for any reason of ``fisherprune.prune``, or where the
                optimizers train none of the model's parameters, as of sharded models;
                the model is then left as it was.
        """
        chosen = {"criterion": criterion, "sparsity": sparsity, "scope": scope}
        loop = self._loop._replace(batches=each_sample_once(batches))
        return self._prune(loop, chosen | options)

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Hold the masks of a state in place of others."""
        self._read(state)
        if self.masks is not None:
            self._hold(self.masks, self._loop)
