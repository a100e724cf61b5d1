"""A job of three ranks that train together, and what comes of it on each.

All that needs several processes is done in one job. Its third rank is without images in
some batches.
"""

import io
import os
import signal
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import distributed, nn

from fisherprune import train
from fisherprune.errors import FisherpruneError
from fisherprune.statistics.ranks import RankError
from fisherprune.train.__main__ import main
from fisherprune.train.ranks import Ranks

RANKS = 3
BATCHES = (7, 2, 1)
"""Sizes of whole batches: even the last one makes a BatchNorm's batch, of positions."""


def batches(seed):
    """Return batches of images and labels, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(BATCHES), 3, 5, 5, generator=generator) * 3 + 40
    y = torch.randint(4, (len(x),), generator=generator)
    return list(zip(x.split(BATCHES), y.split(BATCHES), strict=True))


class Net(nn.Module):
    """BatchNorm of all kinds, and a layer that no output depends on."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(3), nn.BatchNorm2d(6, momentum=None)]
            + [nn.BatchNorm1d(6, affine=False, track_running_stats=False)]
        )
        self.idle, self.linear = nn.Linear(2, 2), nn.Linear(6, 4)

    def forward(self, x):
        x = self.norms[1](self.conv(self.norms[0](x)))
        x = self.norms[2](x.relu().flatten(2)).tanh()
        return self.linear(F.batch_norm(x, None, None, training=True).relu().mean(2))


def steps(seed, ranks, dtype=torch.float32, **layout):
    """Return the gradients of each batch, and all buffers after them."""
    torch.manual_seed(seed)
    net, found = Net().to(dtype, **layout), {}
    for i, (x, y) in enumerate(batches(seed)):
        share = ranks.share(len(y))
        with share.batchnorm():
            loss = F.cross_entropy(net(x[share.rows].to(dtype)), y[share.rows])
        net.zero_grad()
        loss.backward(share.weight(loss))
        ranks.add_up_gradients(net.parameters())
        found |= {f"{i} {n}": p.grad for n, p in net.named_parameters()}
    return found | dict(net.named_buffers())


def told(call):
    """Return kind and text of the error of a call that must fail."""
    try:
        call()
    except FisherpruneError as error:
        return type(error).__name__, f"{error}"
    return None


def late_mistakes(config, ranks):
    """Return what is told where a rank differs, and where it fails."""

    def failing():
        if ranks.number == 1:
            raise FisherpruneError("the second")
        return 3

    differing = [torch.full((2,), float(ranks.number // 2))]
    small = replace(config, lr=1e30, epochs=9)
    return {
        "in turn": told(lambda: ranks.in_turn(failing)),
        "from the second": ranks.from_first(failing),
        "tensors": told(lambda: ranks.check_same("tensors", differing)),
        "diverged": told(lambda: train.run(small, quiet=True)),
        "count": told(lambda: train.run(replace(config, processes=2), quiet=True)),
        "data": told(lambda: train.run(replace(config, train_samples=9**9))),
    }


def said(argv):
    """Return what a command ends with and prints."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def be_rank(configs, resumed, commands, seed):
    """Return what this rank finds in a job: every rank does the same calls."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {n: train.run(c, quiet=True) for n, c in configs.items()}
    for name, (folder, config) in resumed.items():
        results[name] = train.run(config, folder=folder, quiet=True)
    commands = {name: said(argv) for name, argv in commands.items()}
    distributed.init_process_group("gloo")
    ranks = Ranks(distributed.group.WORLD)
    found = {
        "steps": steps(seed, ranks),
        "channels_last": steps(seed, ranks, memory_format=torch.channels_last),
        "float64": steps(seed, ranks, torch.float64),
        "told": late_mistakes(configs["fts"], ranks),
        "results": results,
        "commands": commands,
    }
    every = [None] * RANKS
    distributed.all_gather_object(every, found)
    distributed.destroy_process_group()
    return every


def small(num_classes, in_channels):
    """Return a model with BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(in_channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes)),
    )


class Interrupt:
    """Presses Ctrl-C for this process after a checkpoint of the ranks it starts."""

    def __init__(self, checkpoint):
        self.pid, self.left = os.getpid(), checkpoint

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(self.pid, signal.SIGINT)


def fail_at(rank, others, after=0):
    """Fail on a rank, after some seconds; do something else on others."""
    if os.environ["RANK"] == str(rank):
        time.sleep(after)
        return torch.ones(2) @ torch.ones(3)
    return others()


def end_at(rank, others):
    """End a rank as the system does where memory is short."""
    if os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), signal.SIGKILL)
    return others()


def others_fail():
    """Fail because another rank did."""
    raise RankError("process_group: ranks can't be reached")


class Unsendable(Exception):
    """An error that no other process can have."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def say(value):
    """Return what a rank finds in its environment; refuse zero."""
    if value == 0:
        raise Unsendable("this", "that")
    return value, int(os.environ["WORLD_SIZE"]), torch.get_num_threads()
