"""LSTM, GRU and RNN, of any depth and direction, packed or not, and their cells."""

import pytest
import torch
import truth
from checks import assert_moments, refused
from nets import batches, data
from torch import nn
from torch.nn.utils import parametrizations, rnn

import fisherprune as fp
from fisherprune.persample.registry import register_rewrite
from fisherprune.statistics.hessian_gradient import hessian_gradient_product

# Nowhere may the model run sample by sample instead.
pytestmark = pytest.mark.filterwarnings("error::fisherprune.FisherpruneWarning")

STEPS = 6
SEEN: list = []
"""Outputs and states of all runs: a pass forgets what a model keeps for itself."""

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

    def __init__(self, kind, **options):
        super().__init__()
        make, own = KINDS[kind]
        self.embed = nn.Linear(3, 5)
        self.layer = layer = make(5, 7, **own, **options)
        ways = 2 if layer.bidirectional else 1
        states = layer.num_layers * ways
        self.sizes = [layer.proj_size or 7, 7][: 2 if make is nn.LSTM else 1]
        self.starts = nn.ModuleList(nn.Linear(3, states * size) for size in self.sizes)
        self.head = nn.Linear(ways * self.sizes[0] + states * sum(self.sizes), 5)

    def states(self, x):
        """Return the initial states, ``[states, N, size]``."""
        found = [
            torch.tanh(start(x.mean(1))).unflatten(1, (-1, size)).transpose(0, 1)
            for start, size in zip(self.starts, self.sizes, strict=True)
        ]
        return tuple(found) if len(found) > 1 else found[0]

    def recur(self, x, states):
        """``[N, T, 5]`` and states -> ``[N, T, out]`` and the last states."""
        if self.layer.batch_first:
            return self.layer(x, states)
        outputs, last = self.layer(x.transpose(0, 1), states)
        return outputs.view(len(outputs), len(x), -1).transpose(0, 1), last

    def forward(self, x):
        outputs, last = self.recur(torch.tanh(self.embed(x)), self.states(x))
        last = last if isinstance(last, tuple) else (last,)
        SEEN.append((outputs, *last))
        steps = torch.arange(1, outputs.shape[1] + 1, dtype=x.dtype).cos()
        mean = (outputs * steps.unsqueeze(1)).sum(1)
        last = [state.transpose(0, 1).flatten(1) for state in last]
        return self.head(torch.cat([mean, *last], 1))


class WithoutStates(Recurrent):
    """No initial states are given."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        del self.starts

    def states(self, x):
        return None


class Learned(Recurrent):
    """The initial states are parameters."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.starts = nn.ParameterList(
            torch.randn(start.out_features // size, 1, size)
            for start, size in zip(self.starts, self.sizes, strict=True)
        )

    def states(self, x):
        found = [start.expand(-1, len(x), -1).contiguous() for start in self.starts]
        return tuple(found) if len(found) > 1 else found[0]


def lengths(x):
    """Return how long each sequence is, by its numbers: 1 to T."""
    return 1 + (x[:, 1:, 0] > 0).sum(1)


class PackedNet(Recurrent):
    """The same of packed sequences, after a recurrent layer of packed ones."""

    def __init__(self, *args, is_sorted=False, **options):
        super().__init__(*args, **options)
        self.is_sorted = is_sorted
        self.first = nn.GRU(5, 5, bidirectional=True)

    def forward(self, x):
        self.lengths = lengths(x)
        return super().forward(x)

    def recur(self, x, states):
        packed = rnn.pack_padded_sequence(
            x, self.lengths, batch_first=True, enforce_sorted=self.is_sorted
        )
        hidden, _ = self.first(packed)
        data = hidden.data[:, :5] * hidden.data[:, 5:]
        outputs, last = self.layer(hidden._replace(data=data), states)
        return rnn.pad_packed_sequence(outputs, batch_first=True)[0], last


def inputs(samples=13):
    return data((STEPS, 3), samples)


def check(model, x, y, group_size=3, size=5):
    """Compare the moments of all parameters with a loop."""
    parameters = dict(model.named_parameters())
    options = {"parameters": parameters, "group_size": group_size}
    found = fp.gradient_moments(model, batches(x, y, size), **options)
    assert_moments(found, truth.moments(model, x, y, parameters, group_size))


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_all_parameters(kind, shape, group_size):
    check(Recurrent(kind, **SHAPES[shape]), *inputs(), group_size)


@pytest.mark.parametrize("make", [WithoutStates, Learned])
@pytest.mark.parametrize("kind", KINDS)
def test_initial_states_may_be_missing_or_parameters(kind, make):
    x, y = inputs(7)
    check(make(kind, **SHAPES["both_ways"]), x, y, size=3)  # the last batch has one


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("shape", ["one", "samples_first", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_packed_sequences(kind, shape, is_sorted):
    model = PackedNet(kind, is_sorted=is_sorted, **SHAPES[shape])
    x, y = inputs()
    if is_sorted:
        x = x[lengths(x).argsort(descending=True)]
    check(model, x, y)


@pytest.mark.parametrize("make", [Recurrent, PackedNet])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_last_states_are_those_of_pytorch(kind, shape, make):
    model, (x, y) = make(kind, **SHAPES[shape]), inputs(4)
    parameters = dict(model.layer.named_parameters(prefix="layer"))
    fp.gradient_moments(model, [(x, y)], parameters=parameters)
    tapped = SEEN[-1]
    model.eval()(x)
    for found, expected in zip(tapped, SEEN[-1], strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)


class Unbatched(WithoutStates):
    """Inputs of one sample, which the layer gets without their first dimension."""

    def recur(self, x, states):
        outputs, last = self.layer(x[0], states)
        last = last if isinstance(last, tuple) else (last,)
        return outputs.unsqueeze(0), tuple(state.unsqueeze(1) for state in last)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_a_batch(kind):
    batched, (x, y) = WithoutStates(kind, **SHAPES["all"]), inputs(5)
    unbatched = Unbatched(kind, **SHAPES["all"])
    unbatched.load_state_dict(batched.state_dict())
    names = dict(batched.named_parameters())
    found = fp.gradient_moments(
        unbatched, batches(x, y, 1), parameters=dict(unbatched.named_parameters())
    )
    assert_moments(found, truth.moments(batched, x, y, names))


class Cells(nn.Module):
    """Takes the steps one by one; inputs [N, T, 3]."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, 5)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(torch.cat([state], 1) if torch.is_tensor(state) else state[1])


CELLS = {
    "lstm": lambda: nn.LSTMCell(3, 5),
    "gru": lambda: nn.GRUCell(3, 5),
    "tanh": lambda: nn.RNNCell(3, 5),
    "relu": lambda: nn.RNNCell(3, 5, nonlinearity="relu"),
    "no_bias": lambda: nn.LSTMCell(3, 5, bias=False),
}


@pytest.mark.parametrize("cell", CELLS)
def test_moments_of_cells(cell):
    check(Cells(CELLS[cell]()), *inputs())


def test_some_parameters_of_a_layer():
    model, (x, y) = Recurrent("lstm", **SHAPES["both_ways"]), inputs()
    names = ["layer.weight_hh_l0", "layer.bias_ih_l1_reverse", "embed.weight"]
    parameters = {name: model.get_parameter(name) for name in names}
    found = fp.gradient_moments(model, [(x, y)], parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, names))


def test_recurrent_weights_that_are_computed():
    model = WithoutStates("gru")
    parametrizations.weight_norm(model.layer, "weight_hh_l0")
    check(model, *inputs())


def test_autocast_runs_in_its_own_dtype():
    class Halved(Recurrent):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    for kind in KINDS.keys() - {"relu"}:  # rounding moves numbers over its kink
        model, (x, y) = Halved(kind, **SHAPES["both_ways"]), inputs(4)
        parameters = dict(model.layer.named_parameters(prefix="layer"))
        found = fp.gradient_moments(model, [(x, y)], parameters=parameters)
        model.__class__ = Recurrent
        for name, (mean, _) in truth.moments(model, x, y, parameters).items():
            assert truth.relative_error(found.mean[name], mean) < 0.1, (kind, name)


class Direct(PackedNet):
    """Packs by itself, and calls the function that nn.GRU calls."""

    def recur(self, x, states):
        packed = rnn.pack_padded_sequence(x, self.lengths, True, False)
        weights, options = self.layer._flat_weights, (True, 1, 0.0, False, False)
        data, last = torch.gru(
            packed.data, packed.batch_sizes, states, weights, *options
        )
        packed = packed._replace(data=data)
        return rnn.pad_packed_sequence(packed, batch_first=True)[0], last


def test_packed_sequences_in_an_order_that_nobody_knows_are_refused():
    model, (x, y) = Direct("gru"), inputs()
    parameters = dict(model.layer.named_parameters(prefix="layer"))
    match = (
        "packed sequences must be passed by nn.LSTM, .* got a direct call of torch.l"
    )
    refused(model, x, y, match, parameters=parameters)


@pytest.mark.parametrize("kind", ["gru", "tanh"])  # of which PyTorch has the second
def test_second_derivatives_are_those_of_pytorch(kind):
    model, (x, y) = Recurrent(kind, **SHAPES["both_ways"]), inputs(5)
    parameters = dict(model.named_parameters())
    found = hessian_gradient_product(model, [(x, y)], parameters=parameters)
    expected = truth.hessian_gradient(model, x, y, parameters)
    for name, wanted in expected.items():
        assert truth.relative_error(found[name], wanted) < 1e-4, name


def test_a_function_is_rewritten_once():
    match = "register_rewrite: function must be one that is not registered yet, got lst"
    with pytest.raises(fp.FisherpruneError, match=match):
        register_rewrite(torch.lstm)
