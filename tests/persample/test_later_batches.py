"""A model that does in a later batch what it did not do in the first one.

What is known of a call from an earlier batch of the same shapes must not be used then.
"""

import pytest
import torch
import truth
from checks import assert_moments
from nets import Own
from torch import nn

import fisherprune as fp
from fisherprune.losses import classification

CLASSES = 5


def plain(m, x):
    return m.fc(x)


def in_order_of_values(m, x):
    order = x[:, 0, 0].argsort()
    return m.fc(x[order])[order.argsort()]


def by_a_mask(m, x):
    h = x.new_zeros(*x.shape[:2], 6)
    chosen = x[..., 0] > -torch.inf
    h[chosen] = m.fc(x[chosen])
    return h


def transposed(m, x):
    return m.fc(x.transpose(0, 1)).transpose(0, 1)


def one_by_one(m, x):
    return torch.stack([m.fc(each) for each in x])


def by_vmap(m, x):
    return torch.vmap(m.fc)(x)


def in_double(m, x):
    return nn.functional.linear(x.double(), m.fc.weight.double()).float() + m.fc.bias


def by_its_weight(m, x):
    weight = m.fc.weight.expand(len(x), -1, -1) * x.new_ones(len(x), 1, 1)
    return x @ weight.mT + m.fc.bias


LATER = [
    in_order_of_values,
    by_a_mask,
    transposed,
    one_by_one,
    by_vmap,
    in_double,
    by_its_weight,
]


def forward(m, x):
    return m.head(torch.tanh(m.ways[m.way](m, x)).mean(1))


@pytest.mark.parametrize("later", LATER, ids=lambda f: f.__name__)
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.filterwarnings("ignore::fisherprune.FisherpruneWarning")
def test_moments(later, group_size):
    parts = {"fc": nn.Linear(8, 6), "head": nn.Linear(6, CLASSES)}
    model = Own(forward, **parts, ways=[plain, later], way=0)
    batches = [(torch.randn(4, 3, 8), torch.randint(CLASSES, (4,))) for _ in range(4)]

    def given():
        for model.way, batch in zip((0, 1, 0, 1), batches, strict=True):
            yield batch

    named = dict(model.named_parameters())
    found = fp.gradient_moments(model, given(), parameters=named, group_size=group_size)
    model.way = 0
    expected = truth.moments_of_losses(
        model, batches, [*named], classification, [group_size]
    )
    assert_moments(found, expected[group_size])
