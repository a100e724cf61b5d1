"""The check before any pass: it promises what the pass then does."""

import copy
import doctest
import inspect
import warnings

import pytest
import torch
from nets import Mixing, Own, RowByRow, conv_net, data
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherprune as fp
from fisherprune.train import check as command


def mixed(m, x):
    """Call what has a rule, what has none, and what needs a loop over samples."""
    x = torch.cdist(torch.tanh(m.fc(x)), m.w)
    return m.head(torch.func.vmap(lambda one: one * m.row)(x))


def mixed_net():
    parts = {"w": nn.Parameter(torch.randn(4, 4)), "row": nn.Parameter(torch.randn(1))}
    parts |= {"fc": nn.Linear(4, 4), "head": nn.Linear(4, 5), "idle": nn.Linear(2, 2)}
    return Own(mixed, **parts)


@pytest.mark.parametrize(
    "make, shape",
    [(conv_net, (3, 9, 9)), (mixed_net, (4,)), (RowByRow, (3, 4))],
)
@pytest.mark.parametrize("samples", [1, 2, 13])
def test_the_ways_are_those_of_the_pass(make, shape, samples):
    model, (x, y) = make(), data(shape, samples)
    before, modes = (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
    )
    found = fp.check(model, (x, y))
    assert_as_before(model, before, modes)
    named = dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.FisherpruneWarning)
        moments = fp.gradient_moments(model, [(x, y)], parameters=named)
    assert found.ways == moments.paths and [*found.ways] == [*named]
    assert found.samples == min(samples, 3)
    slow = {n for n, ways in found.ways.items() if not {*ways} - {"loop"}}
    assert found.reasons.keys() == slow


def test_what_the_table_says():
    model, (x, y) = mixed_net(), data((4,))
    found = fp.check(model, (x, y))
    assert found.ways["w"] == ("vmap",) and found.ways["row"] == ("loop",)
    assert found.ways["idle.bias"] == ()
    assert "no loss of these samples" in found.reasons["idle.bias"]
    total = 16 + 1 + 20 + 25 + 6
    shares = {"rules": 45, "vmap": 16, "loop": 1, "none": 6}
    assert found.covers == pytest.approx({k: n / total for k, n in shares.items()})
    lines = f"{found}".splitlines()
    assert lines[0] == "68 weights in 8 parameters, tried with 3 samples"
    assert "rules 66.18%, vmap 23.53%, loop 1.47%, none 8.82%" in lines[1]
    (row,) = [line.split() for line in lines if line.startswith("row")]
    number = row[3]
    assert row == ["row", "1", "loop", number]
    assert f"  {number} {found.reasons['row']}" in lines and repr(found) == f"{found}"


def test_the_example():
    result = doctest.testmod(inspect.getmodule(fp.check))
    assert result.attempted and not result.failed


def test_like_parameters_share_a_row():
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(40)]
    model, (x, y) = nn.Sequential(*layers, nn.Linear(4, 5)), data((4,))
    found = fp.check(model, (x, y))
    assert len(found.ways) == 82
    lines = f"{found}".splitlines()
    assert len(lines) < 15
    (row,) = [line.split() for line in lines if line.startswith("*.*.weight")]
    assert row == ["*.*.weight", "(40", "parameters)", "640", "linear"]


def test_what_a_parameter_alone_forbids():
    model, (x, y) = Mixing(lambda _, h: h), data((4,))
    model.count = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    model.fc.weight.register_hook(lambda grad: 2 * grad)
    model.head.requires_grad_(False)
    found = fp.check(model, (x, y))
    assert "it is of int64" in found.reasons["count"]
    assert "gradient hook" in found.reasons["fc.weight"]
    assert found.ways["count"] == found.ways["fc.weight"] == ()
    assert found.ways["fc.bias"] == found.ways["head.weight"] == ("linear",)
    assert found.covers["none"] == pytest.approx(18 / (2 + 20 + 25))
    settings = "\n".join(found.settings)
    assert "'count' is not of real floating-point numbers" in settings
    assert "'count', 'head.weight', 'head.bias' are frozen" in settings


class Recomputed(Mixing):
    """Computes its activations again in the backward pass."""

    gradient_checkpointing = True

    def forward(self, x):
        h = checkpoint(self.fc, x, use_reentrant=False)
        return self.head(torch.tanh(h))


def assert_as_before(model, before, modes):
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def norm_net(**options):
    norm = nn.BatchNorm1d(4, **options)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.Dropout(), nn.Linear(4, 5))


def failing(m, x):
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    "make, reason, setting",
    [
        (lambda: Mixing(lambda _, h: h - h.mean(0)), "samples mix", "train mode"),
        (
            lambda: Recomputed(None),
            "activation checkpointing runs layers again",
            "'' is set to activation checkpointing",
        ),
        (
            lambda: norm_net(track_running_stats=False),
            "Expected more than 1 value per channel",
            "'1' is BatchNorm without running statistics",
        ),
        (lambda: Own(failing, fc=nn.Linear(4, 5)), "KeyError: 'no such", "train mode"),
    ],
    ids=["mix", "checkpointing", "batchnorm", "fails"],
)
def test_what_no_pass_can_do(make, reason, setting):
    model, (x, y) = make(), data((4,))
    before = copy.deepcopy(model.state_dict())
    model[0].eval() if isinstance(model, nn.Sequential) else model.fc.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    found = fp.check(model, (x, y))
    assert set(found.ways.values()) == {()} and found.covers["none"] == 1
    assert found.reasons.keys() == found.ways.keys()
    assert all(reason in why for why in found.reasons.values())
    assert setting in "\n".join(found.settings)
    assert torch.equal(state, torch.get_rng_state())
    assert_as_before(model, before, modes)


def test_which_settings_matter():
    model, (x, y) = norm_net(), data((4,))
    said = "\n".join(fp.check(model, (x, y)).settings)
    assert "5 modules are in train mode, among them 1 of BatchNorm and 1 of dr" in said
    assert "'1' is BatchNorm whose running statistics saw no data" in said
    fp.measure_batchnorm(model, [(x, y)])
    assert fp.check(model.eval(), (x, y)).settings == ()
    half = model.to(torch.bfloat16)
    (said,) = fp.check(half, (x.bfloat16(), y)).settings
    assert "and 3 more are bfloat16: gradients keep 2 to 3 digits" in said
    with torch.autocast("cpu", torch.bfloat16):
        (said,) = fp.check(model.float(), (x, y)).settings
    assert said.startswith("autocast is on: bfloat16")
    (said,) = fp.check(model, (x[:1], y[:1])).settings
    assert "one sample" in said


def test_what_is_not_there_is_not_counted():
    (x, y), model = data((4,)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    (said,) = fp.check(model, (x, y)).settings
    assert said.startswith("3 modules are in train mode: scoring runs all in eval mode")
    model.append(nn.Dropout()).eval()[2].train()
    (said,) = fp.check(model, (x, y)).settings
    assert said.startswith("1 module is in train mode, among them 1 of dropout: ")


def test_layers_that_are_zero_are_named():
    (x, y), model = data((4,)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)).eval()
    nn.init.zeros_(model[0].bias)  # which stops no gradient
    assert fp.check(model, (x, y)).settings == ()
    nn.init.zeros_(model[1].weight)
    (said,) = fp.check(model, (x, y)).settings
    assert said.startswith("'1' is initialized to zero, so no gradient comes back")
    found = fp.gradient_moments(model, [(x, y)])
    assert not found.fisher["0.weight"].any()


def test_attention_is_seen():
    layers = [nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 5)).eval()
    x, y = data((3, 8))
    (said,) = fp.check(model, (x, y)).settings
    assert "attention runs fused; grasp and prospr" in said


def test_batches_of_any_structure_and_chosen_parameters():
    model, (x, y) = Mixing(lambda _, h: h), data((4,))
    one = {"fc.weight": model.fc.weight}

    def losses(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), y[:3], reduction="none")

    def alone(model, batch):
        return model(batch["x"]).square().sum(1)

    found = fp.check(model, {"x": x}, losses=alone, parameters=one)
    assert found.ways == {"fc.weight": ("linear",)} and found.sizes == {"fc.weight": 16}
    assert (
        "the model must run with one"
        in fp.check(model, {"x": x}, losses=losses).reasons["fc.weight"]
    )


def test_mistakes_in_arguments_are_errors():
    model, (x, y) = Mixing(lambda _, h: h), data((4,))
    for arguments, options, match in (
        ((None, (x, y)), {}, "model must be a torch.nn.Module"),
        ((nn.Tanh(), (x, y)), {}, "at least one parameter"),
        ((model, (x, y)), {"parameters": [1]}, "parameters must be a dict"),
        ((model, x), {}, "batch 0 is Tensor"),
        ((model, (x[:0], y[:0])), {}, "at least one sample"),
        ((model, (x, y), "mse"), {}, "loss_fn must be a function"),
        ((model, (x, y)), {"losses": nn.MSELoss()}, "losses must be a function"),
    ):
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.check(*arguments, **options)


def test_the_command(capsys):
    options = "--dataset digits --model resnet20 --device cpu --train-samples 40"
    assert command.main(options.split()) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(
        "269,434 weights in 59 parameters, tried with 3"
    )
    assert "ways of the weights: rules 100.00%" in out


def test_the_help_of_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code in (0, None)
    assert all(name in out for name in ("--model", "--dataset", "--device", "--seed"))
    assert "--sparsity" not in out and "--epochs" not in out
