"""How many functions a batch of a pass calls: on a GPU, each is a launch."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fisherprune as fp
from fisherprune import models
from fisherprune.losses import classification

NO_LAUNCHES = frozenset(
    "detach view _unsafe_view t expand permute slice select unsqueeze squeeze "
    "as_strided alias empty".split()
)
"""Functions that compute nothing."""


class Calls(TorchDispatchMode):
    """Counts functions, by whether they compute something."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        launches = func.overloadpacket.__name__ not in NO_LAUNCHES
        self.found["launches" if launches else "views"] += 1
        return func(*args, **kwargs or {})


def calls(model, count, size=4, **options):
    batches = [(torch.rand(size, 3, 8, 8), torch.arange(size)) for _ in range(count)]
    with Calls() as calls:
        fp.gradient_moments(model, batches, **options)
    return calls.found


def test_a_batch_has_few_launches():
    """ResNet18: 20 convolutions, each with a BatchNorm, 17 ReLUs and 8 additions.

    Forward and backward these are 20 + 20 + 17 + 8 and, where nothing reads the images'
    gradient, 19 + 20 + 17 + 8; then there are 20 calls of our kernel.
    """
    model = models.resnet18()
    least = (20 + 20 + 17 + 8) + (19 + 20 + 17 + 8) + 20
    few, more = calls(model, 2), calls(model, 4)
    found = {what: (more[what] - few[what]) / 2 for what in more}
    assert found["launches"] <= least + 25, found  # pooling, linear layer, loss, copies
    assert found["views"] <= 8 * 20, found


def test_a_first_batch_has_no_more_where_functions_keep_samples_apart():
    """ResNet18: a batch of one sample has no check, and another one the same calls."""
    model = models.resnet18()
    first, lone = calls(model, 1), calls(model, 1, size=1)
    assert first["launches"] == lone["launches"]


def test_losses_of_outputs_have_no_check_either():
    model = models.resnet18()
    first, lone = (calls(model, 1, size, losses=classification) for size in (4, 1))
    assert first["launches"] == lone["launches"]


def test_the_check_of_a_first_batch_has_few_launches():
    """A batch of one sample has no check; others run a sample alone, and compare it.

    And gradients of the losses of three must reach no others. That is so where a loss
    of one's own may mix them. The sample is 20 convolutions, each with a BatchNorm,
    17 ReLUs and 8 additions, and so are the three; backward, there is one convolution
    less, and a zero for each of 62 parameters or fewer.
    """
    model, forward = models.resnet18(), 20 + 20 + 17 + 8

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    few, more = (calls(model, 1, size, losses=losses) for size in (1, 4))
    found = {what: more[what] - few[what] for what in more}
    heads = 2 + 20  # pooling and linear layer, loss and conditions
    alone = forward + heads + 20 + 62  # copies, comparisons
    reach = 2 * (forward + heads) + 62
    assert found["launches"] <= alone + reach, found
    assert found["views"] <= 2 * (2 * 20 + 12 * 20), (
        found
    )  # forward, samples in tensors
