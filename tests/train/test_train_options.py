"""Validation, memory format, torch.compile and TensorBoard of a run."""

import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import images_of, rows, stopped

from fisherprune import models, train
from fisherprune.errors import FisherpruneError
from fisherprune.masks.masks import Masks
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.folder import RunFolder
from fisherprune.runs.metrics import Metrics
from fisherprune.train import steps, trainer
from fisherprune.train.trainer import Trainer, memory_format

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


pytestmark = pytest.mark.usefixtures("one_thread")


def a_trainer(config, tmp_path):
    model = models.create(config.model, 10, 1, seed=0).to(config.device)
    folder = RunFolder(config, tmp_path / "run")
    return Trainer(config, model, images_of(config), folder, quiet=True)


def test_validation_every_some_epochs(small, capsys):
    """And in the last: else the best weights of a short run are its first."""
    config = replace(small, epochs=6, warmup_epochs=2, validation_every=3)
    result = train.run(config)
    validated = [row["validation_accuracy"] != "" for row in rows(result.folder)]
    assert validated == [True, False, True, False, False, True, False, True]
    assert [row["validation_f1"] != "" for row in rows(result.folder)] == validated
    assert capsys.readouterr().out.count("validation loss") == 4
    assert result.best_epoch in (1, 4, 6)


def test_the_metric_chooses_the_best(small, monkeypatch):
    """Accuracy is best in the first epoch, macro F1 in the second."""
    figures = [Metrics(1, 0.9, 0, 0, 0.1), Metrics(1, 0.5, 0, 0, 0.7)]
    for metric, best in (("accuracy", 1), ("f1", 2)):
        found = iter([*figures, *figures[:1] * 3])
        monkeypatch.setattr(trainer, "evaluate", lambda *a, found=found: next(found))
        config = replace(small, epochs=3, validation_metric=metric)
        assert train.run(config, quiet=True).best_epoch == best


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize(
    "chosen, amp, model, device, expected",
    [
        ("auto", False, "resnet18", CPU, torch.channels_last),
        ("auto", False, "vgg19", CPU, torch.contiguous_format),
        ("auto", True, "vgg19", CPU, torch.channels_last),
        ("auto", False, "resnet18", CUDA, "as its precision"),
        ("auto", False, "vgg19", CUDA, "as its precision"),
        ("auto", True, "resnet18", CUDA, torch.channels_last),
        ("channels_last", False, "vgg19", CUDA, torch.channels_last),
        ("contiguous", True, "resnet18", CPU, torch.contiguous_format),
    ],
)
def test_memory_formats(chosen, amp, model, device, expected, precision, tf32):
    tf32(precision)
    if expected == "as its precision":
        expected = {"tf32": torch.channels_last, "ieee": torch.contiguous_format}
        expected = expected[precision]
    config = TrainConfig(memory_format=chosen, amp=amp, model=model)
    assert memory_format(config, device) == expected


@pytest.mark.parametrize("chosen", ["contiguous", "channels_last"])
def test_images_and_weights_have_the_format(small, chosen, tmp_path):
    config = replace(small, memory_format=chosen)
    a = a_trainer(config, tmp_path)
    form = trainer.memory_format(config, CPU)
    assert a.model.layer1[0].conv1.weight.is_contiguous(memory_format=form)
    seen = []
    a.model.layer1.register_forward_hook(lambda *x: seen.append(x[2]))
    a.epoch("train")
    assert all(x.is_contiguous(memory_format=form) for x in seen)
    assert {x.requires_grad for x in seen} == {True, False}  # trained, validated


def test_the_format_moves_no_score_and_only_rounds(small, monkeypatch):
    make_masks = steps.make_masks

    def spy(config, model, *args):
        weights = [p for p in model.parameters() if p.dim() == 4]
        assert all(weight.is_contiguous() for weight in weights)
        return make_masks(config, model, *args)

    monkeypatch.setattr(steps, "make_masks", spy)
    short = replace(small, warmup_epochs=1, train_samples=20, lr=0.001)
    weights = [
        load_file(
            train.run(replace(short, memory_format=chosen), quiet=True).folder
            / "last.safetensors"
        )
        for chosen in ("contiguous", "channels_last")
    ]
    for name, weight in weights[0].items():
        close = torch.isclose(weight, weights[1][name], rtol=1e-3, atol=1e-4)
        assert close.double().mean() > 0.99, name


class Fills(TorchDispatchMode):
    """Notes the strides of what is set to zero, and of its mask."""

    def __init__(self):
        super().__init__()
        self.strides = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        pairs = [args[:2]] if func is torch.ops.aten.masked_fill_.Scalar else []
        if func is torch.ops.aten._foreach_mul_.List:
            pairs = zip(*args, strict=True)
        self.strides += [(x.stride(), mask.stride()) for x, mask in pairs]
        return func(*args, **kwargs or {})


def test_masks_lie_in_memory_as_their_weights(small, tmp_path):
    a = a_trainer(replace(small, memory_format="channels_last"), tmp_path)
    masks = {n: p > 0 for n, p in a.model.named_parameters() if p.dim() == 4}
    with Fills() as fills:
        a.prune(Masks({n: m.contiguous() for n, m in masks.items()}))
        a.epoch("train")
    assert len(fills.strides) > 2 * len(masks)  # weights and gradients
    assert all(held == mask for held, mask in fills.strides)


class Tiny(nn.Module):
    """A network that compiles in seconds."""

    def __init__(self, classes, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, classes)

    def forward(self, x):
        return self.linear(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def test_compiled_training_resumes_and_hides_the_wrapper(small, monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "resnet20", Tiny)
    config = replace(small, epochs=2, compile=True, sparsity=0.5)
    used = []
    compiled = trainer.compiled
    monkeypatch.setattr(trainer, "compiled", lambda m: used.append(m) or compiled(m))
    whole = train.run(config, quiet=True)
    assert len(used) == 1

    stopped(config, tmp_path / "run", 2)
    torch.compiler.reset()  # as a new process compiles anew
    train.run(config, folder=tmp_path / "run", quiet=True)
    for name in ("masks", "last", "best"):
        a = (whole.folder / f"{name}.safetensors").read_bytes()
        assert a == (tmp_path / "run" / f"{name}.safetensors").read_bytes()
    plain = train.run(replace(config, compile=False), quiet=True)
    states = [load_file(r.folder / "last.safetensors") for r in (whole, plain)]
    assert states[0].keys() == states[1].keys() == Tiny(10, 1).state_dict().keys()
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-3, atol=1e-5), name


def test_a_compiler_that_does_not_work_is_a_mistake(small, monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "resnet20", Tiny)
    config = replace(small, compile=True)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nowhere"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    torch.compiler.reset()
    try:
        with pytest.raises(FisherpruneError, match="compile: .*C.. compil.* leave the"):
            train.run(config, quiet=True)
    finally:
        torch.compiler.reset()


def test_an_error_of_another_kind_is_not_its_own_cause(small, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("of another kind")

    monkeypatch.setattr(steps, "make_masks", fail)
    with pytest.raises(RuntimeError, match="of another kind") as caught:
        train.run(small, quiet=True)
    assert caught.value.__cause__ is None


def points(folder):
    """Return ``[(step, value), ...]`` by tag, of all event files."""
    from tensorboard.backend.event_processing import event_accumulator

    loaded = event_accumulator.EventAccumulator(
        str(folder / "tensorboard"), purge_orphaned_data=False
    )
    loaded.Reload()
    return {
        tag: [(event.step, event.value) for event in loaded.Scalars(tag)]
        for tag in loaded.Tags()["scalars"]
    }


def test_tensorboard_shows_each_epoch_once(small, tmp_path):
    pytest.importorskip("tensorboard")
    config = replace(
        small, epochs=4, warmup_epochs=1, validation_every=2, tensorboard=True
    )

    for _ in range(3):
        stopped(config, tmp_path)
    train.run(config, folder=tmp_path, quiet=True)
    found, table = points(tmp_path), rows(tmp_path)
    assert [row["phase"] for row in table] == ["warmup", *["train"] * 4]
    for tag in ("loss/train", "f1/train", "accuracy/validation", "lr"):
        metric, _, part = tag.partition("/")
        column = f"{part}_{metric}" if part else metric
        expected = [(i, row[column]) for i, row in enumerate(table, 1) if row[column]]
        assert [step for step, _ in found[tag]] == [i for i, _ in expected]
        values = [float(value) for _, value in expected]
        assert [v for _, v in found[tag]] == pytest.approx(values, rel=1e-6)


def test_tensorboard_that_is_not_there(small, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(FisherpruneError, match="pip install tensorboard, or leave the"):
        train.run(replace(small, tensorboard=True), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_convolutions_are_deterministic_in_a_run_alone(small, monkeypatch):
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", True)
    before = cudnn.deterministic
    train.run(
        replace(small, epochs=0),
        quiet=True,
        checkpointed=lambda: seen.append((cudnn.deterministic, cudnn.benchmark)),
    )
    assert seen == [(True, False)]
    assert (cudnn.deterministic, cudnn.benchmark) == (before, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu(small, tmp_path, recwarn):
    a = a_trainer(replace(small, device="cuda", amp=True, batch_size=8), tmp_path)
    waits = []
    for count in (2, 6):
        batches = [batch for batch, _ in zip(a.batches, range(count), strict=False)]
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            a.pass_over(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(len(recwarn))
    assert waits[0] == waits[1]
