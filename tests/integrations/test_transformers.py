"""The callback in Hugging Face's Trainer: a tiny GPT-2 learns random words."""

import doctest
import gc
from types import SimpleNamespace

import pytest
import torch
from mask_cases import assert_zero_where_pruned

import fisherprune as fp

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fisherprune.integrations import transformers as door  # noqa: E402
from fisherprune.integrations.transformers import PruningCallback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fisherprune.LayerCollapseWarning"),
]
SAMPLES, EPOCHS = 9, 3
OPTIONS = {"save_strategy": "no", "report_to": "none", "use_cpu": True}
OPTIONS |= {"per_device_train_batch_size": 2, "num_train_epochs": EPOCHS}
OPTIONS |= {"learning_rate": 0.01, "weight_decay": 0.1, "disable_tqdm": True}


class Recorder(transformers.TrainerCallback):
    """Keeps what the weights are at the start of epochs, and checks zeros by steps."""

    def __init__(self, pruning):
        self.pruning, self.starts = pruning, []

    def on_epoch_begin(self, *_, model, **__):
        self.starts.append({n: p.detach().clone() for n, p in model.named_parameters()})

    def on_step_end(self, *_, model, **__):
        if self.pruning.masks is not None:
            assert_zero_where_pruned(model, self.pruning.masks)


@pytest.fixture(scope="module", autouse=True)
def _little_garbage():
    """Let the Trainer, which collects garbage each time, not look at all modules."""
    gc.freeze()
    yield
    gc.unfreeze()


def tiny(seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends))


def words():
    rows = torch.randint(11, (SAMPLES, 8))
    return [{"input_ids": row, "labels": row} for row in rows]


def trained(folder, data, callback, model=None, resume=None, **options):
    """Return a Trainer that has trained a model, and its Recorder."""
    recorder = Recorder(callback)
    args = transformers.TrainingArguments(f"{folder}", **OPTIONS | options)
    trainer = transformers.Trainer(
        tiny(0) if model is None else model,
        args,
        train_dataset=data,
        callbacks=[recorder, callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def batches_of(data, size=2):
    rows = [row["input_ids"] for row in data]
    batches = [torch.stack(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [{"input_ids": rows, "labels": rows} for rows in batches]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a Trainer makes a folder
    result = doctest.testmod(door)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    "how, options",
    [
        (("fts", 0.8), {}),
        (("snip", 0.5, "layer"), {"structure": "2:4"}),
        (("fisher_diag", 0.7, "erk"), {"group_size": 2, "min_per_layer": 2}),
        (("snip", 0.6), {"rounds": 3}),
    ],
)
def test_masks_are_those_of_find_masks(how, options, tmp_path):
    data, callback = words(), PruningCallback(*how, **options)
    order = {"train_sampling_strategy": "sequential", "max_steps": 3}
    trainer, _ = trained(
        tmp_path, data, callback, gradient_accumulation_steps=2, **order
    )
    code, sparsity, *scope = how
    options |= {"losses": fp.losses.hugging_face}
    (masks,) = fp.find_masks(
        tiny(0), batches_of(data), code, [sparsity], *scope, **options
    )
    assert callback.masks == masks
    assert_zero_where_pruned(trainer.model, masks)
    moved = trainer.model.get_parameter("transformer.h.0.attn.c_attn.weight")
    first = tiny(0).get_parameter("transformer.h.0.attn.c_attn.weight")
    assert not torch.equal(moved, torch.where(moved == 0, 0, first))


def test_after_some_epochs_on_own_batches(tmp_path):
    data, own = words(), batches_of(words(), 3)
    callback = PruningCallback("fts", 0.8, after_epochs=2, batches=own)
    trainer, recorder = trained(tmp_path, data, callback, optim="sgd")
    start = tiny(0)
    start.load_state_dict(recorder.starts[2], strict=False)
    losses = fp.losses.hugging_face
    assert callback.masks == fp.find_masks(start, own, "fts", [0.8], losses=losses)[0]
    assert recorder.starts[2]["transformer.h.0.attn.c_attn.weight"].all()
    assert_zero_where_pruned(trainer.model, callback.masks)


def test_a_training_that_is_resumed_goes_on_with_the_same_masks(tmp_path):
    """Also from a checkpoint of before the pruning, and with other arguments."""
    data = words()
    how = {"save_strategy": "epoch", "num_train_epochs": 4}
    whole = PruningCallback("fts", 0.8, after_epochs=2)
    trainer, _ = trained(tmp_path, data, whole, **how)
    wanted = trainer.model.state_dict()
    steps = -(-SAMPLES // 2)
    for epoch, options in ((3, ("snip", 0.5)), (1, ("fts", 0.8))):
        callback = PruningCallback(*options, after_epochs=2)
        resume = f"{tmp_path}/checkpoint-{epoch * steps}"
        again, recorder = trained(tmp_path, data, callback, tiny(1), resume, **how)
        assert callback.masks == whole.masks
        assert same(again.model.state_dict(), wanted)
        assert len(recorder.starts) == 4 - epoch


def test_the_training_sees_the_batches_it_would_have_seen(tmp_path):
    """Scoring a loader draws no random number of the training's."""
    data, orders = words(), []
    for after in (0, 2):
        seen = []

        def collate(rows, seen=seen):
            seen.append([row["input_ids"].tolist() for row in rows])
            return transformers.default_data_collator(rows)

        args = transformers.TrainingArguments(f"{tmp_path}", **OPTIONS)
        callback = PruningCallback("snip", 0.5, after_epochs=after)
        trainer = transformers.Trainer(
            tiny(0), args, collate, data, callbacks=[callback]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        batches = -(-SAMPLES // 2)
        scored = slice(after * batches, (after + 1) * batches)
        assert sorted(sum(seen[scored], [])) == sorted(
            row["input_ids"].tolist() for row in data
        )
        del seen[scored]
        orders.append(seen)
    assert orders[0] == orders[1]


def test_a_second_training_goes_on_and_another_model_is_pruned_anew(tmp_path):
    data, callback = words(), PruningCallback("fts", 0.8)
    trainer, _ = trained(tmp_path, data, callback, num_train_epochs=1)
    masks = callback.masks
    trained(tmp_path, data, callback, trainer.model, num_train_epochs=1)
    assert callback.masks is masks
    assert_zero_where_pruned(trainer.model, masks)
    other, _ = trained(tmp_path, data, callback, tiny(1), num_train_epochs=1)
    assert callback.masks != masks
    assert_zero_where_pruned(other.model, callback.masks)


def test_the_hold_ends_with_the_training(tmp_path):
    callback = PruningCallback("fts", 0.8)
    trainer, _ = trained(tmp_path, words(), callback, num_train_epochs=1)
    dense = tiny(1).state_dict()
    trainer.model.load_state_dict(dense)
    assert same(trainer.model.state_dict(), dense)


def test_a_failure_leaves_the_model_as_it_was(tmp_path):
    data, model = words(), tiny(0)
    wrong = [{"input_ids": torch.full((1, 8), 12), "labels": torch.full((1, 8), 12)}]
    callback = PruningCallback("fts", 0.8, batches=wrong)
    with pytest.raises(fp.FisherpruneError, match="the model failed on batch 0"):
        trained(tmp_path, data, callback, model)
    assert callback.masks is None and model.training
    assert same(model.state_dict(), tiny(0).state_dict())
    model.load_state_dict(tiny(1).state_dict())
    assert same(model.state_dict(), tiny(1).state_dict())


def test_a_checkpoint_is_not_loaded_under_the_masks_of_a_training_that_failed(tmp_path):
    data, how = words(), {"save_strategy": "epoch"}

    class Stop(transformers.TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            if state.epoch == 2:
                raise KeyboardInterrupt

    callback = PruningCallback("fts", 0.8, after_epochs=1)
    recorder = Recorder(callback)
    args = transformers.TrainingArguments(f"{tmp_path}", **OPTIONS | how)
    callbacks = [recorder, callback, Stop()]
    trainer = transformers.Trainer(tiny(0), args, None, data, callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    first = f"{tmp_path}/checkpoint-5"
    with pytest.raises(fp.FisherpruneError, match="training that failed were held: ca"):
        trainer.train(resume_from_checkpoint=first)
    callback.remove()
    trainer.train(resume_from_checkpoint=first)
    whole, _ = trained(tmp_path, data, PruningCallback("fts", 0.8, after_epochs=1))
    assert same(trainer.model.state_dict(), whole.model.state_dict())


def test_mistakes_are_found_before_the_training(tmp_path):
    for options, text in (
        ({"criterion": "ftz"}, "unknown criterion 'ftz'"),
        ({"sparsity": 2}, "sparsity must be"),
        ({"scope": "block"}, "scope must be one of"),
        ({"structure": "2:3"}, "sparsity must be"),
        ({"after_epochs": -1}, "after_epochs must be a whole number of at least 0, go"),
    ):
        with pytest.raises(fp.FisherpruneError, match=text):
            PruningCallback(**options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparcity'"):
        PruningCallback(sparcity=0.5)
    late = PruningCallback(after_epochs=EPOCHS)
    with pytest.raises(fp.FisherpruneError, match="less than the 3 epochs .* got 3"):
        trained(tmp_path, words(), late)
    smooth = {"label_smoothing_factor": 0.1}
    with pytest.raises(fp.FisherpruneError, match="losses must be given where the Tra"):
        trained(tmp_path, words(), PruningCallback(), **smooth)


def test_data_without_an_end_need_batches(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield {"input_ids": torch.arange(8), "labels": torch.arange(8)}

    steps = {"max_steps": 2}
    with pytest.raises(fp.FisherpruneError, match="batches must be given where the tr"):
        trained(tmp_path, Endless(), PruningCallback("snip"), **steps)
    own = batches_of(words())
    callback = PruningCallback("snip", 0.5, batches=own)
    trainer, _ = trained(tmp_path, Endless(), callback, **steps)
    assert_zero_where_pruned(trainer.model, callback.masks)


def test_an_end_before_the_pruning_is_told(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = True

    callback = PruningCallback("snip", after_epochs=2)
    args = transformers.TrainingArguments(f"{tmp_path}", **OPTIONS)
    trainer = transformers.Trainer(
        tiny(0), args, train_dataset=words(), callbacks=[callback, Stop()]
    )
    with pytest.warns(fp.FisherpruneWarning, match="ended before epoch 2 began"):
        trainer.train()


@pytest.mark.parametrize(
    "ranks, flat, text",
    [
        (1, True, "optimizer must be one that trains the model's own parameters, whic"),
        (2, False, "processes must be connected by torch.distributed, got 2 that are "),
    ],
)
def test_trainings_that_are_not_understood(ranks, flat, text):
    """DeepSpeed trains flat copies of the weights; a TPU's processes meet otherwise."""
    model = tiny(0)
    weights = [torch.zeros(3, requires_grad=True)] if flat else model.parameters()
    args = SimpleNamespace(world_size=ranks, ddp_broadcast_buffers=None)
    state = SimpleNamespace(epoch=0, stateful_callbacks={})
    given = {"optimizer": torch.optim.SGD(weights), "model": model}
    with pytest.raises(fp.FisherpruneError, match=text):
        PruningCallback("magnitude").on_epoch_begin(
            args, state, None, train_dataloader=batches_of(words()), **given
        )
    assert same(model.state_dict(), tiny(0).state_dict())
