"""What a run does and writes: masks, weights, metrics, streams."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainings import images_of, rows

import fisherprune as fp
from fisherprune import models, train
from fisherprune.data.augment import TrainingBatches
from fisherprune.errors import FisherpruneError
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.folder import RunFolder
from fisherprune.runs.metrics import Metrics
from fisherprune.runs.result import LayerCount, check_pruned_are_zero
from fisherprune.runs.words import table
from fisherprune.statistics.run import statistics_of
from fisherprune.streams import stream, stream_seed
from fisherprune.train import masking, steps, trainer
from fisherprune.train.subnetwork import subnetwork_of

pytestmark = pytest.mark.usefixtures("one_thread")


def same_files(a, b, name):
    return (a.folder / name).read_bytes() == (b.folder / name).read_bytes()


def test_a_run_writes_everything_and_keeps_pruned_weights_at_zero(small, capsys):
    result = train.run(replace(small, epochs=2, warmup_epochs=1, bn_warmup=True))
    assert {p.name for p in result.folder.iterdir()} == {
        "config.json",
        "metrics.csv",
        "masks.safetensors",
        "last.safetensors",
        "best.safetensors",
        "results.json",
    }
    masks = fp.Masks.load(result.folder / "masks.safetensors")
    assert masks.sparsity() == result.sparsity
    assert result.kept == result.total - math.ceil(result.total * 9 / 10)
    for name in ("last", "best"):
        weights = load_file(result.folder / f"{name}.safetensors")
        for key, mask in masks.items():
            assert torch.equal(weights[key] != 0, mask)
    assert [row["phase"] for row in rows(result.folder)] == ["warmup", "train", "train"]
    assert capsys.readouterr().out.count(" epoch ") == 3
    saved = json.loads((result.folder / "results.json").read_text())
    assert saved["test"]["best"]["accuracy"] == result.best.accuracy
    assert saved["sparsity"] == result.sparsity
    assert saved["layers"]["layer1.0.conv1.weight"]["total"] == 16 * 16 * 9
    assert saved["environment"]["torch"] == torch.__version__
    assert TrainConfig(**saved["config"]) == result.config


def test_the_best_weights_are_those_of_the_best_validation(small):
    result = train.run(replace(small, epochs=3, lr=0.05, train_samples=300), quiet=True)
    accuracies = [float(row["validation_accuracy"]) for row in rows(result.folder)]
    assert result.best_epoch == accuracies.index(max(accuracies)) + 1
    images = images_of(result.config)
    network = models.create("resnet20", 10, 1)
    network.load_state_dict(load_file(result.folder / "best.safetensors"))
    validation = trainer.evaluate(network, images.validation, "", True)
    assert validation.accuracy == max(accuracies)
    assert trainer.evaluate(network, images.test, "", True) == result.best
    network.load_state_dict(load_file(result.folder / "last.safetensors"))
    assert trainer.evaluate(network, images.test, "", True) == result.last


def test_the_first_of_equal_validations_is_the_best(small, monkeypatch):
    same = Metrics(1.0, 0.5, 0.5, 0.5, 0.5)
    monkeypatch.setattr(trainer, "evaluate", lambda *args: same)
    assert train.run(replace(small, epochs=2), quiet=True).best_epoch == 1


@pytest.mark.parametrize("nesterov", [False, True])
def test_training_is_plain_sgd_with_steps(small, nesterov):
    dense = replace(small, method="none", sparsity=0.0, epochs=3, lr_drops=(1, 2))
    config = replace(dense, memory_format="contiguous", nesterov=nesterov)
    result = train.run(config, quiet=True)

    images = images_of(config)
    network = models.create("resnet20", 10, 1, seed=stream_seed(0, "initialization"))
    optimizer = torch.optim.SGD(
        network.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=nesterov
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.2)
    order, chance = stream(0, "training order"), stream(0, "augmentation")
    for _ in range(3):
        network.train()
        for x, labels in TrainingBatches(images.train, 16, order, chance):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x), labels).backward()
            optimizer.step()
        schedule.step()
    last = load_file(result.folder / "last.safetensors")
    for name, value in network.state_dict().items():
        assert torch.allclose(last[name], value, rtol=1e-5, atol=1e-7), name
    logits = network.eval()(images.test.normalize(images.test.images))
    accuracy = (logits.argmax(1) == images.test.labels).double().mean().item()
    assert result.last.accuracy == pytest.approx(accuracy)


def test_equal_seeds_give_equal_bits_and_leave_the_global_state(small):
    torch.manual_seed(1)
    expected = torch.random.get_rng_state()
    first = train.run(small, quiet=True)
    assert torch.equal(torch.random.get_rng_state(), expected)
    torch.manual_seed(2)
    second = train.run(small, quiet=True)
    other = train.run(replace(small, seed=1), quiet=True)
    assert rows(first.folder) == rows(second.folder) and first.last == second.last
    for name in ("last.safetensors", "best.safetensors", "masks.safetensors"):
        assert same_files(first, second, name)
        assert not same_files(first, other, name)
    assert first.folder != second.folder


def test_the_method_moves_neither_initialization_nor_order(small):
    # At sparsity 0 nothing is removed, so every method is the dense baseline.
    dense = train.run(replace(small, method="none", sparsity=0.0), quiet=True)
    scored = train.run(replace(small, sparsity=0.0), quiet=True)
    random = train.run(replace(small, method="random", sparsity=0.0), quiet=True)
    assert rows(dense.folder) == rows(scored.folder) == rows(random.folder)
    assert same_files(dense, scored, "last.safetensors")
    assert not (dense.folder / "masks.safetensors").exists()
    assert dense.sparsity == 0


def test_scoring_data_do_not_move_the_training(small):
    found = [images_of(replace(small, score_samples=n)) for n in (10, 30, None)]
    assert [len(x.scoring) for x in found] == [10, 30, 65]
    assert all(torch.equal(x.train.images, found[0].train.images) for x in found)
    everything = found[2]
    assert torch.equal(
        everything.scoring.images.flatten(1).long().sum(1).sort().values,
        everything.train.images.flatten(1).long().sum(1).sort().values,
    )


def test_scoring_sees_plain_training_images_in_eval_mode(small, monkeypatch):
    seen = {}

    def spy(task, needs, **options):
        modes, model = set(), task.model
        assert all(m.training for m in model.modules())
        seen.update(vars(task), x=torch.cat([x for x, _ in task.batches]))
        for module in model.modules():
            module.register_forward_hook(lambda m, *_: modes.add(m.training))
        found = statistics_of(task, needs, **options)
        assert modes == {False} and all(m.training for m in model.modules())
        return found

    monkeypatch.setattr(masking, "statistics_of", spy)
    train.run(replace(small, epochs=0, group_size=3), quiet=True)
    images = images_of(small)
    assert torch.equal(seen["x"], images.scoring.normalize(images.scoring.images))
    assert seen["group_size"] == 3


def test_no_epochs_test_the_pruned_network(small):
    result = train.run(replace(small, epochs=0), quiet=True)
    assert result.best == result.last and result.best_epoch == 0
    assert not (result.folder / "metrics.csv").exists()
    assert round(result.sparsity, 3) == 0.9


def test_batchnorm_warmup_measures_exact_statistics(small):
    images = images_of(small)
    network = models.create("resnet20", 10, 1, seed=0)
    before = {k: v.clone() for k, v in network.named_parameters()}
    seen = []
    network.conv1.register_forward_hook(lambda *a: seen.append(a[2].double()))
    masking.warm_up_batchnorm(network, images.train, 65, seed=0, quiet=True)
    assert all(torch.equal(v, before[k]) for k, v in network.named_parameters())
    assert {m.momentum for m in network.modules() if hasattr(m, "momentum")} == {0.1}
    (output,) = seen
    assert torch.allclose(
        network.bn1.running_mean.double(), output.mean((0, 2, 3)), atol=1e-6
    )
    variance = output.transpose(0, 1).flatten(1).var(1)
    assert torch.allclose(network.bn1.running_var.double(), variance, rtol=1e-4)


def test_warmup_goes_before_the_mask(small):
    warm = replace(small, warmup_epochs=1, epochs=0)
    a, b = (train.run(replace(warm, method=m), quiet=True) for m in ("snip", "random"))
    assert rows(a.folder) == rows(b.folder)
    assert not same_files(a, b, "masks.safetensors")


def test_a_last_batch_of_one_image_trains(small):
    # 65 images by 16: at 8x8 pixels the last stages have one position, so a
    # batch of one would give BatchNorm a single value.
    result = train.run(replace(small, model="vgg11", method="magnitude"), quiet=True)
    assert math.isfinite(result.last.loss)


def test_amp_trains_in_bfloat16(small):
    plain, amp = (
        train.run(replace(small, method="magnitude", amp=amp), quiet=True)
        for amp in (False, True)
    )
    assert same_files(plain, amp, "masks.safetensors")
    assert rows(plain.folder) != rows(amp.folder)
    losses = [float(rows(result.folder)[0]["train_loss"]) for result in (plain, amp)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_written(small, tmp_path):
    with pytest.raises(FisherpruneError, match="loss must stay finite, got (nan|inf)"):
        train.run(replace(small, epochs=9, lr=1e30), quiet=True)
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "masks.safetensors").exists()
    text = (folder / "metrics.csv").read_text()
    assert "nan" in text or "inf" in text


@pytest.mark.parametrize(
    "lr, message",
    [
        (1e35, "testing: the loss of the last weights must be finite, got (nan|inf)"),
        (1e308, "testing: the last weights must be finite, got NaN or inf.* in conv1"),
    ],
)
def test_weights_that_are_lost_in_the_last_step_are_no_result(small, lr, message):
    config = replace(small, train_samples=32, batch_size=32, lr=lr)
    with pytest.raises(FisherpruneError, match=f"{message}.*; a smaller --lr may help"):
        train.run(config, quiet=True)
    (folder,) = Path(small.output_dir).iterdir()
    assert not (folder / "results.json").exists()
    again = f"^testing: .*written until now is in {folder}$"
    with pytest.raises(FisherpruneError, match=again):  # nor is it when it is resumed
        train.run(config, folder=folder, quiet=True)


def test_weights_that_are_not_finite_are_no_result_whatever_the_loss(
    small, monkeypatch
):
    config = replace(small, train_samples=32, batch_size=32, lr=1e308)
    found = Metrics(1.0, 0.1, 0.1, 0.1, 0.1)
    monkeypatch.setattr(steps, "evaluate", lambda *args: found)
    with pytest.raises(FisherpruneError, match="the last weights must be finite, got"):
        train.run(config, quiet=True)


def test_pruned_weights_that_moved_are_noticed(small):
    network = models.create("resnet20", 10, 1, seed=0)
    masks = fp.select_masks(fp.score(network, [], "magnitude"), 0.5)
    with pytest.raises(AssertionError, match="pruned weights of conv1.weight are not"):
        check_pruned_are_zero(network.state_dict(), masks)
    masks.apply_(network)
    check_pruned_are_zero(network.state_dict(), masks)
    left = subnetwork_of(
        network, torch.ones(1, 1, 8, 8), fp.prunable_parameters(network), None
    )
    assert {c.name: c.kept for c in left.layers} == {
        n: int(m.sum()) for n, m in masks.items()
    }


def test_collapsed_and_starved_layers_are_warned_of(small):
    result = train.run(replace(small, epochs=0), quiet=True)
    layers = (
        LayerCount("first", 8, 8, 80),
        LayerCount("second", 8, 7, 80),
        LayerCount("third", 8, 0, 80),
    )
    result = replace(result, layers=layers, flops=None)
    assert result.warnings == (
        "second keeps 7 weights for 8 outputs: some outputs are constant",
        "third has collapsed: none of its 80 weights kept",
    )
    text = table(result)
    assert text.count("warning: ") == 2 and "0.0875" in text and "15 of 240" in text
    assert "effective" not in text and "on paths" not in text and "FLOPs" not in text


def test_what_the_mask_leaves_is_in_the_result_and_in_the_table(small):
    config = replace(small, epochs=0, method="magnitude", sparsity=0.99)
    result = train.run(config, quiet=True)
    masks = fp.Masks.load(result.folder / "masks.safetensors")
    model, image = models.create("resnet20", 10, 1), torch.ones(1, 1, 8, 8)
    paths = fp.effective_masks(model, image, masks)
    flops = fp.flops(model, image, masks)
    assert {x.name: x.effective for x in result.layers} == {
        name: int(mask.sum()) for name, mask in paths.items()
    }
    assert result.effective == paths.kept() < masks.kept()
    assert result.effective_sparsity == pytest.approx(paths.sparsity())
    assert result.flops == {"dense": flops.dense, "masked": flops.masked}
    text = table(result)
    assert f"effective sparsity {paths.sparsity():.6f}: {paths.kept():,} w" in text
    share = f"{100 * flops.masked / flops.dense:.2f} % of {flops.dense:,}"
    assert f"FLOPs of an image {flops.masked:,}: {share}" in text
    assert "density  on paths" in text
    saved = json.loads((result.folder / "results.json").read_text())
    assert saved["effective"] == paths.kept() and saved["flops"] == result.flops


def test_a_network_without_a_path_is_warned_of_once(small):
    layers = (
        LayerCount("first", 8, 9, 80, 0),
        LayerCount("second", 8, 0, 80, 0),
        LayerCount("third", 8, 10, 80, 0),
    )
    result = replace(train.run(replace(small, epochs=0), quiet=True), layers=layers)
    assert result.warnings == (
        "second has collapsed: none of its 80 weights kept",
        "no kept weight is on a path from an input to an output",
    )
    result = replace(result, layers=(*layers, LayerCount("fourth", 8, 10, 80, 3)))
    assert (
        "third keeps 10 weights, none of them on a path from an" in result.warnings[2]
    )


def test_a_network_whose_paths_can_not_be_told_is_trained_all_the_same():
    class Chooses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = torch.nn.Linear(64, 8), torch.nn.Linear(4, 10)

        def forward(self, x):
            return self.head(self.fc(x.flatten(1)).topk(4).values)

    model = Chooses()
    left = subnetwork_of(
        model, torch.ones(1, 1, 8, 8), fp.prunable_parameters(model), None
    )
    assert left.layers == (LayerCount("fc.weight", 8, 512, 512, None),)
    assert left.flops == {"dense": 2 * 512 + 2 * 40, "masked": 2 * 512 + 2 * 40}
    (note,) = left.notes
    assert note.startswith("the effective sparsity is not known: effective_masks: path")
    left = subnetwork_of(model, torch.ones(1, 5), fp.prunable_parameters(model), None)
    assert (
        left.flops is None and "the FLOPs are not known: flops: the mo" in left.notes[1]
    )


def first_epoch(config, monkeypatch, moved):
    """Return the images and labels of an epoch, one of its streams being another."""

    def other(seed, name):
        return stream(seed + (name == moved), name)

    model = models.create("resnet20", 10, 1)
    with monkeypatch.context() as patch, RunFolder(config) as folder:
        patch.setattr(trainer, "stream", other)
        trained = trainer.Trainer(config, model, images_of(config), folder, quiet=True)
        images, labels = zip(*trained.batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_order_and_augmentation_have_streams_of_their_own(small, monkeypatch):
    images, labels = first_epoch(small, monkeypatch, "")
    assert not torch.equal(first_epoch(small, monkeypatch, "training order")[1], labels)
    augmented = first_epoch(small, monkeypatch, "augmentation")
    assert torch.equal(augmented[1], labels)
    assert not torch.equal(augmented[0], images)
