"""The callback in Lightning's Trainer, with modules that step in various ways."""

import doctest
import importlib
import re
import sys
import warnings

import pytest
import torch
from mask_cases import assert_zero_where_pruned
from nets import conv_net
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

import fisherprune as fp

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402

from fisherprune.integrations import lightning as door  # noqa: E402
from fisherprune.integrations.lightning import PruningCallback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fisherprune.LayerCollapseWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SAMPLES, EPOCHS, SIZE = 10, 3, 4


class Net(LightningModule):
    """Momentum and weight decay; checks after every batch that pruned weights are 0."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.ends, self.masks = conv_net(), [], lambda: None

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, 0.9, weight_decay=0.1)

    def on_train_epoch_end(self):
        self.ends.append({n: t.clone() for n, t in self.state_dict().items()})

    def on_train_batch_end(self, *_):
        if self.masks() is not None:
            assert_zero_where_pruned(self, self.masks())


class ByHand(Net):
    """Steps by itself two optimizers, each of which trains a part."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.automatic_optimization = False

    def configure_optimizers(self):
        parts = list(self.net[:4].parameters()), list(self.net[4:].parameters())
        return torch.optim.SGD(parts[0], 0.05, 0.9), torch.optim.AdamW(parts[1], 0.01)

    def training_step(self, batch):
        self.manual_backward(super().training_step(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class Shifted(Net):
    """Changes its batches on their way."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 2, batch[1]


def images():
    return [(torch.randn(3, 9, 9), i % 5) for i in range(SAMPLES)]


def fitted(data, callback, net=None, ckpt_path=None, callbacks=(), **options):
    """Return the Trainer that has fitted a module."""
    net = Net() if net is None else net
    net.masks = lambda: callback.masks
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar"]
    how = dict.fromkeys([*quiet, "enable_model_summary"], False)
    how |= {"accelerator": "cpu", "max_epochs": EPOCHS}
    how |= {"callbacks": [callback, *callbacks]} | options
    trainer = Trainer(**how)
    loader = data if isinstance(data, DataLoader) else DataLoader(data, SIZE)
    trainer.fit(net, loader, ckpt_path=ckpt_path)
    return trainer


def batches_of(data, size=SIZE):
    return list(DataLoader(data, size))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_examples():
    result = doctest.testmod(door)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("kind", [Net, ByHand])
@pytest.mark.parametrize(
    "how, options",
    [
        (("fts", 0.8), {}),
        (("snip", 0.5, "layer"), {"structure": "channels", "rounds": 3}),
        (("fisher_diag", 0.7, "erk"), {"group_size": 2, "min_per_layer": 2}),
        (("synflow", 0.6), {"rounds": 3}),
    ],
)
def test_masks_are_those_of_find_masks(kind, how, options):
    data, callback, net = images(), PruningCallback(*how, **options), kind()
    code, sparsity, *scope = how
    (masks,) = fp.find_masks(
        kind(), batches_of(data), code, [sparsity], *scope, **options
    )
    first = net.net[9].weight.detach().clone()
    many = {} if kind is ByHand else {"accumulate_grad_batches": 2}
    fitted(data, callback, net, **many)
    assert callback.masks == masks and len(net.ends) == EPOCHS
    assert_zero_where_pruned(net, masks)
    assert not torch.equal(net.net[9].weight, first * (net.net[9].weight != 0))


def test_what_optimizers_remember_of_pruned_weights_is_cleaned():
    data, callback, net = (
        images(),
        PruningCallback("fts", 0.8, after_epochs=1),
        ByHand(),
    )
    trainer = fitted(data, callback, net)
    states = {p: s for one in trainer.optimizers for p, s in one.state.items()}
    for name, mask in callback.masks.items():
        state = states[net.get_parameter(name)]
        for moment in (m for m in state.values() if m is not None and m.dim()):
            assert not moment[~mask].any() and moment[mask].any()


def test_batches_are_those_of_the_training():
    """As hooks change them, and no more than the Trainer takes."""
    data, callback = images(), PruningCallback("fts", 0.8)
    fitted(data, callback, Shifted(), limit_train_batches=2)
    batches = [(2 * (x + 1), y) for x, y in batches_of(data)[:2]]
    assert callback.masks == fp.find_masks(Net(), batches, "fts", [0.8])[0]


def test_after_some_epochs_with_a_loss_and_batches_of_ones_own():
    def losses(module, batch):
        return cross_entropy(module.net(batch["x"]), batch["y"], reduction="none")

    own = [{"x": x, "y": y} for x, y in batches_of(images())]
    callback = PruningCallback("fts", 0.8, after_epochs=2, batches=own, losses=losses)
    net, before = Net(), Net()
    fitted(images(), callback, net)
    before.load_state_dict(net.ends[1])
    assert before.net[0].weight.all()
    assert callback.masks == fp.find_masks(before, own, "fts", [0.8], losses=losses)[0]


@pytest.mark.parametrize("kind", [Net, ByHand])
def test_a_fit_that_goes_on_from_a_checkpoint_holds_the_same_masks(kind, tmp_path):
    """Also from one of before the pruning, and with other arguments."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    data, net = images(), kind()
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    how = {"enable_checkpointing": True, "max_epochs": 4, "default_root_dir": tmp_path}
    whole = PruningCallback("fts", 0.8, after_epochs=2)
    fitted(data, whole, net, callbacks=[saving], **how)
    for epoch, options in ((2, ("snip", 0.5)), (0, ("fts", 0.8))):
        callback = PruningCallback(*options, after_epochs=2)
        again = kind(1)
        fitted(data, callback, again, tmp_path / f"epoch={epoch}.ckpt", **how)
        assert callback.masks == whole.masks
        assert same(again.state_dict(), net.state_dict())
        assert len(again.ends) == 3 - epoch


@pytest.mark.parametrize("workers", [0, 1])
def test_the_training_sees_the_batches_it_would_have_seen(workers):
    """Also where workers persist, and with shuffled samples."""
    data, seen = images(), []

    class Seeing(Net):
        def training_step(self, batch):
            seen[-1].append(batch[1].tolist())
            return super().training_step(batch)

    for criterion, own in (("snip", None), ("magnitude", [])):  # the second reads none
        seen.append([])
        callback = PruningCallback(criterion, 0.5, batches=own)
        loader = DataLoader(
            data,
            SIZE,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        torch.manual_seed(6)
        fitted(loader, callback, Seeing())
    assert seen[0] == seen[1] and len(seen[0]) == EPOCHS * 3


def test_a_second_fit_goes_on_and_another_module_is_pruned_anew():
    data, callback, net = images(), PruningCallback("fts", 0.8), Net()
    trainer = fitted(data, callback, net, max_epochs=1)
    masks = callback.masks
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, DataLoader(data, SIZE))
    assert callback.masks is masks and len(net.ends) == 2
    assert_zero_where_pruned(net, masks)
    other = Net(1)
    fitted(data, callback, other, max_epochs=1)
    assert callback.masks != masks
    assert_zero_where_pruned(other, callback.masks)
    other.load_state_dict(Net(2).state_dict())  # the hold has ended
    assert same(other.state_dict(), Net(2).state_dict())


@pytest.mark.parametrize("fails", ["scoring", "training"])
def test_a_failure_leaves_no_hold(fails):
    class Failing(Net):
        def training_step(self, batch):
            raise RuntimeError("no such step")

    net, own = Failing(), [(torch.randn(2, 4, 9, 9), torch.arange(2))]
    callback = PruningCallback(batches=own if fails == "scoring" else None)
    with pytest.raises((fp.FisherpruneError, RuntimeError), match="failed on|no such"):
        fitted(images(), callback, net)
    if fails == "scoring":
        assert callback.masks is None and net.training
        assert same(net.state_dict(), Net().state_dict())
    net.load_state_dict(Net(1).state_dict())
    assert same(net.state_dict(), Net(1).state_dict())


def test_mistakes():
    with pytest.raises(fp.FisherpruneError, match="unknown criterion 'ftz'"):
        PruningCallback("ftz")
    with pytest.raises(fp.FisherpruneError, match="less than the 3 epochs .* got 3"):
        fitted(images(), PruningCallback(after_epochs=3))
    loaders = [DataLoader(images(), SIZE), DataLoader(images(), SIZE)]
    wanted = "batches must be given where there are several training dataloaders, got 2"
    with pytest.raises(fp.FisherpruneError, match=re.escape(wanted)):
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[PruningCallback()],
        )
        trainer.fit(Net(), loaders)

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(3, 9, 9), 1

    with pytest.raises(fp.FisherpruneError, match="batches must be given where the tr"):
        fitted(DataLoader(Endless(), SIZE), PruningCallback(), max_steps=2)


def test_a_fit_that_ends_early_is_told():
    class Stopping(Net):
        def on_train_batch_end(self, *_):
            self.trainer.should_stop = True

    with pytest.warns(fp.FisherpruneWarning, match="ended before epoch 2 began"):
        fitted(images(), PruningCallback(after_epochs=2), Stopping())


def test_pytorch_lightning(monkeypatch):
    """Where the package ``lightning`` is not installed."""
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "fisherprune.integrations.lightning")
    theirs = importlib.import_module("fisherprune.integrations.lightning")

    class Other(pytorch_lightning.LightningModule):
        forward, training_step = Net.forward, Net.training_step
        configure_optimizers = Net.configure_optimizers

    data, callback, net = images(), theirs.PruningCallback("fts", 0.8), Other()
    net.net = Net().net
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar"]
    how = dict.fromkeys([*quiet, "enable_model_summary"], False)
    how |= {"accelerator": "cpu", "max_epochs": 2, "callbacks": callback}
    pytorch_lightning.Trainer(**how).fit(net, DataLoader(data, SIZE))
    assert callback.masks == fp.find_masks(Net(), batches_of(data), "fts", [0.8])[0]
    assert_zero_where_pruned(net, callback.masks)


@pytest.mark.parametrize("ranks, repeats", [(2, False), (4, True)])
def test_samples_that_a_sampler_repeats_are_told(ranks, repeats):
    data = images()
    sampler = DistributedSampler(data, ranks, 0, shuffle=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fitted(DataLoader(data, 3, sampler=sampler), PruningCallback("snip", 0.5))
    texts = [f"{each.message}" for each in told]
    assert repeats == any("sampler repeats 2 samples, so that" in t for t in texts)
