"""LSTM, GRU and RNN, of any depth and direction, packed or not, and their cells."""

import pytest
import torch
import truth
from checks import assert_moments
from nets import batches, data
from torch import nn
from torch.nn.utils import rnn

import fisherprune as fp

STEPS = 6

KINDS = {
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
SHAPES = {
    "one": {},
    "samples_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "deep": {"num_layers": 3, "dropout": 0.5},
    "both_ways": {"num_layers": 2, "bidirectional": True},
    "all": {
        "num_layers": 2,
        "bidirectional": True,
        "bias": False,
        "batch_first": True,
    },
}


class Recurrent(nn.Module):
    """All of a recurrent layer's outputs count; inputs [N, T, 3].

    What comes before the layer gets gradients through its inputs and initial states.
    """

    def __init__(self, kind, with_states=False, **options):
        super().__init__()
        make, own = KINDS[kind]
        self.embed = nn.Linear(3, 5)
        self.layer = make(5, 7, **own, **options)
        layer = self.layer
        ways = layer.num_layers * (2 if layer.bidirectional else 1)
        self.sizes = [layer.proj_size or 7, 7][: 2 if kind in "lstm projected" else 1]
        self.starts = nn.ModuleList(nn.Linear(3, ways * size) for size in self.sizes)
        outputs = (2 if layer.bidirectional else 1) * self.sizes[0]
        self.head = nn.Linear(outputs + ways * sum(self.sizes), 5)
        self.with_states = with_states

    def states(self, x):
        if not self.with_states:
            return None
        found = [
            torch.tanh(start(x.mean(1))).unflatten(1, (-1, size)).transpose(0, 1)
            for start, size in zip(self.starts, self.sizes, strict=True)
        ]
        return tuple(found) if len(found) > 1 else found[0]

    def recur(self, x):
        """``[N, T, 5]`` and states -> ``[N, T, out]`` and the last states."""
        x, states = x
        if self.layer.batch_first:
            return self.layer(x, states)
        outputs, last = self.layer(x.transpose(0, 1), states)
        return outputs.transpose(0, 1), last

    def forward(self, x):
        outputs, last = self.recur((torch.tanh(self.embed(x)), self.states(x)))
        last = last if isinstance(last, tuple) else (last,)
        self.seen = outputs, *last
        steps = torch.arange(1, outputs.shape[1] + 1, dtype=x.dtype).cos()
        mean = (outputs * steps.unsqueeze(1)).sum(1)
        return self.head(
            torch.cat([mean, *(s.transpose(0, 1).flatten(1) for s in last)], 1)
        )


def lengths(x):
    """Return how long each sequence is, by its numbers: 1 to T."""
    return 1 + (x[:, 1:, 0] > 0).sum(1)


class PackedNet(Recurrent):
    """The same of packed sequences, after a recurrent layer of packed ones."""

    def __init__(self, *args, is_sorted=False, **options):
        super().__init__(*args, **options)
        self.is_sorted = is_sorted
        self.first = nn.GRU(5, 5, bidirectional=True)
        self.batch_first = self.layer.batch_first

    def forward(self, x):
        self.lengths = lengths(x)
        return super().forward(x)

    def recur(self, x):
        x, states = x
        x = x if self.batch_first else x.transpose(0, 1)
        packed = rnn.pack_padded_sequence(
            x, self.lengths, self.batch_first, enforce_sorted=self.is_sorted
        )
        hidden, last = self.first(packed)
        data = hidden.data[:, :5] * hidden.data[:, 5:] + last.mean() * 0
        outputs, last = self.layer(hidden._replace(data=data), states)
        return rnn.pad_packed_sequence(outputs, True)[0], last


def inputs(samples=13):
    return data((STEPS, 3), samples)


def check(model, x, y, group_size=3, size=5):
    """Compare the moments of all parameters with a loop; return the model's outputs."""
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if model.with_states or "starts" not in name]
    parameters = {name: parameters[name] for name in names}
    found = fp.gradient_moments(
        model, batches(x, y, size), parameters=parameters, group_size=group_size
    )
    assert_moments(found, truth.moments(model, x, y, names, group_size))


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_all_parameters(kind, shape, with_states):
    check(Recurrent(kind, with_states, **SHAPES[shape]), *inputs())
