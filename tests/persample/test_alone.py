"""What is kept of a sample that runs alone, and when a batch is compared with it."""

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments
from nets import Own
from torch import nn

import fisherprune as fp
from fisherprune.losses import classification
from fisherprune.persample.alone import Records
from fisherprune.persample.layout import Layout

CLASSES = 5


def with_a_table(m, x):
    """Multiply a table with all tokens, the first ones of all samples first."""
    scores = F.linear(m.table, x.transpose(0, 1).flatten(0, 1))
    return m.head(torch.tanh(scores).unflatten(1, (-1, len(x))).mean(1).T)


def test_a_result_that_was_not_kept_is_kept_in_one_more_run():
    table, head = nn.Parameter(torch.randn(6, 8)), nn.Linear(6, CLASSES)
    model = Own(with_a_table, table=table, head=head)
    batches = [(torch.randn(n, 4, 8), torch.randint(CLASSES, (n,))) for n in (3, 2, 1)]
    named = dict(model.named_parameters())
    found = fp.gradient_moments(model, batches, parameters=named)
    expected = truth.moments_of_losses(model, batches, [*named], classification, [1])
    assert_moments(found, expected[1], 1e-4)
    assert found.paths["table"] == ("vmap",)


def read(one, other, change=lambda tensor: None):
    """Return whether two calls read the same, as far as is known at the end."""
    records = Records(compares_late=True)
    held = records.held(one)
    records.values.append(held)
    assert records.differ(held, [other]) == [False]  # not known yet
    change(one), change(other)
    unsure, _ = records.late_verdicts(None)
    return records.read_same(any(map(bool, unsure)))


def change_both(tensor):
    tensor.fill_(7)


def change_one(tensor):
    if tensor[0, 0] == 1:
        tensor.fill_(2)


@pytest.mark.parametrize("lowest", [1.0, -1e9, -torch.inf, torch.finfo().min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_same_beside_those_that_stand_for_infinity(lowest, dtype):
    one = torch.tensor([[1, lowest, 3, 4]]).to(dtype)
    assert read(one, one.clone())
    if lowest == -torch.inf:
        assert not read(one, one.where(one.isfinite(), 5))
        assert not read(one.where(one.isfinite(), 5), one)
    elif lowest == 1:
        assert not read(one, one.flip(1))


@pytest.mark.parametrize("change", [change_both, change_one])
def test_what_changed_since_it_was_read_is_not_known_to_be_the_same(change):
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
    assert not read(one, other, change)


@pytest.mark.parametrize("size", [3, 1024, 2048, 5000, 65536])
def test_whether_the_ends_of_a_batch_are_the_same(size):
    for alike in (True, False):
        records, rows = Records(compares_late=True), torch.randn(4, size)
        if alike:
            rows[-1] = rows[0]
        for is_read in (True, False):
            records.note_outermost(rows * 1, Layout(0, 4), is_read=is_read)
        _, flags = records.late_verdicts(None)
        assert [*map(bool, flags)] == [alike]
