"""Ctrl-C and threads: each pass is alone, and its model is left as it was found."""

import random
import signal
import sys
import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from nets import batches, data
from torch import nn

import fisherprune as fp

INNER = ("statistics/", "tap.py", "contextlib.py", "torch/random.py")
POINTS = 100
"""Moments that are drawn of all, and of the last ones, where things are put back."""


class Counting(nn.Module):
    """Changes a buffer and draws no number, but would in train mode; inputs [N, 4]."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 5)
        self.drop = nn.Dropout()
        self.embed = nn.Embedding(6, 6, max_norm=0.1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.drop(self.fc(x).relu()) + self.embed.weight.mean(0))


def state(model):
    return {
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "values": {n: t.tolist() for n, t in model.state_dict().items()},
        "frozen": [p.requires_grad for p in model.parameters()],
        "taps": torch._C._len_torch_function_stack(),
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
        "handler": signal.getsignal(signal.SIGINT),
        "saved_hooks": torch._C._autograd._saved_tensors_hooks_is_enabled(),
    }


def interrupted_at(point, run):
    """Send SIGINT before the ``point``-th instruction of the pass; return their sum."""
    seen = Counter()

    def trace(frame, event, _):
        if not any(part in frame.f_code.co_filename for part in INNER):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        seen[0] += 1
        if seen[0] == point:
            signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return seen[0]


def test_ctrl_c_leaves_the_model_as_it_was_at_any_moment():
    model, (x, y) = Counting(), data((4,), samples=4)
    found = state(model)

    def run():
        fp.gradient_moments(model, [(x, y)])

    assert found["handler"] is signal.default_int_handler
    instructions = interrupted_at(0, run)
    drawn = random.Random(torch.initial_seed())  # torch's own numbers are looked at
    points = {1, *drawn.choices(range(1, instructions), k=POINTS)}
    points |= {instructions - 1 - i for i in drawn.sample(range(2 * POINTS), POINTS)}
    for point in sorted(points):
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(point, run)
        assert state(model) == found, point
    thread = threading.Thread(target=run, daemon=True)  # the lock is free
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_ctrl_c_takes_effect_at_the_next_batch_and_twice_at_once():
    model, (x, y) = Counting(), data((4,), samples=8)
    for signals, criterion in ((1, "fts"), (2, "fts"), (1, "grasp"), (1, "obd")):
        seen = []

        def read(signals=signals, seen=seen):
            for batch in batches(x, y, 2):
                seen.append("begins")
                for _ in range(signals):
                    signal.raise_signal(signal.SIGINT)
                seen.append("ends")
                yield batch

        with pytest.raises(KeyboardInterrupt):
            fp.score(
                model, type("Again", (), {"__iter__": lambda _: read()})(), criterion
            )
        assert seen == ["begins", "ends"][: 3 - signals]


def test_another_handler_of_ctrl_c_is_called_and_stays():
    model, (x, y), calls = Counting(), data((4,)), []

    def losses(outputs, labels):
        signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(outputs, labels)

    def handler(*args):
        calls.append(args)

    before = signal.signal(signal.SIGINT, handler)
    try:
        fp.gradient_moments(model, [(x, y)], losses)
        assert signal.getsignal(signal.SIGINT) is handler
        assert calls[-1] == (signal.SIGINT, None)
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_that_score_models_with_common_modules_take_turns():
    model, (x, y) = Counting().train(), data((4,))
    other = nn.Sequential(model, nn.Linear(5, 5)).train()
    expected = [fp.score(m, [(x, y)], "fts") for m in (model, other)]
    inside, entered, results, early = threading.Event(), threading.Event(), {}, []

    def first():
        def read():
            inside.set()
            early.append(entered.wait(0.5))  # the other pass begins only after this one
            yield x, y

        results[0] = fp.score(model, read(), "fts")

    def second():
        def read():
            entered.set()
            yield x, y

        inside.wait(60)
        results[1] = fp.score(other, read(), "fts")

    threads = [threading.Thread(target=each, daemon=True) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert early == [False] and entered.is_set()
    for i, scores in enumerate(expected):
        assert all(torch.equal(results[i][name], s) for name, s in scores.items())
    assert all(module.training for module in other.modules()) and model.calls == 0


def test_a_pass_within_a_pass_of_the_same_thread_is_let_in():
    model, (x, y), inner = Counting().train(), data((4,)), []
    expected = fp.gradient_moments(model, [(x, y)])

    def read():
        inner.append(fp.gradient_moments(model, [(x, y)]))
        yield x, y

    found = fp.gradient_moments(model, read())
    for name, fisher in expected.fisher.items():
        assert torch.equal(found.fisher[name], fisher)
        assert torch.equal(inner[0].fisher[name], fisher)
    assert all(module.training for module in model.modules())
