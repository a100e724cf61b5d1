"""How often a pass reads a value of a tensor: on a GPU, each is a wait."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fisherprune as fp
from fisherprune import models

READS = frozenset(
    "item tolist cpu equal allclose nonzero is_nonzero masked_select unique "
    "__bool__ __int__ __float__ __index__ __contains__".split()
)


class Reads(TorchFunctionMode):
    """Counts calls of functions whose result is a value, or depends on one."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in READS:
            self.found[func.__name__] += 1
        return func(*args, **kwargs or {})


def reads(model, count, **options):
    batches = [(torch.rand(4, 3, 16, 16), torch.arange(4)) for _ in range(count)]
    with Reads() as reads:
        fp.gradient_moments(model, batches, **options)
    return reads.found


def test_a_pass_has_few_reads_and_none_for_each_batch():
    model = models.resnet20()
    found = reads(model, 1)
    assert sum(found.values()) <= 4, found
    assert reads(model, 4) == found


@pytest.mark.parametrize("labels", [[0, 10, 3], [-1, 2, 3]])
def test_labels_that_are_no_classes_are_refused_in_any_batch(labels):
    model = torch.nn.Linear(3, 10)
    batches = [(torch.randn(3, 3), torch.tensor(y)) for y in ([1, 2, 9], labels)]
    message = rf"labels must lie in \[0, 10\), .* got {min(labels)} to {max(labels)}"
    with pytest.raises(fp.FisherpruneError, match=message):
        fp.gradient_moments(model, batches, parameters=dict(model.named_parameters()))


@pytest.mark.parametrize("code", ["fts", "snip", "grasp"])
def test_a_loss_that_is_finite_in_a_batch_alone_is_one_of_samples_that_mix(code):
    model = torch.nn.Linear(3, 4)
    batches = [(torch.randn(3, 3), torch.tensor([1, 2, 3])) for _ in range(2)]

    def losses(model, batch):
        outputs = model(batch[0])
        return outputs.square().mean(1) / outputs.std(0).mean()  # of one sample: NaN

    with pytest.raises(fp.FisherpruneError, match="samples mix: the loss of a sample"):
        parameters = dict(model.named_parameters())
        fp.score(model, batches, code, losses=losses, parameters=parameters)


@pytest.mark.parametrize("code", ["fts", "snip", "grasp", "obd"])
def test_a_loss_that_is_not_finite_is_refused_in_any_batch(code):
    model = torch.nn.Linear(3, 4)
    batches = [(torch.randn(3, 3), torch.tensor([1, 2, 3])) for _ in range(3)]
    batches[-1][0][1] = torch.inf
    message = r"finite, got (nan|-?inf) for sample 1"
    with pytest.raises(fp.FisherpruneError, match=message):
        fp.score(model, batches, code, parameters=dict(model.named_parameters()))
