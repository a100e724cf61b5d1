"""A job of two ranks on the CPU that prune under Accelerate, the Trainers and DDP."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from datetime import timedelta

import torch
from nets import conv_net
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import fisherprune as fp

RANKS = 2
SECONDS = 240
"""After which a job that hangs is ended."""
SAMPLES = 9
"""Of which a rank has one more than the other."""
EVEN = 8
"""Of which they have as many, in whole batches."""


def network(seed):
    """Return a network, the same on all ranks."""
    torch.manual_seed(seed)
    return conv_net()


def images(seed, samples=SAMPLES):
    """Return samples, the same on all ranks."""
    torch.manual_seed(seed)
    return [(torch.randn(3, 9, 9), i % 5) for i in range(samples)]


def language(seed):
    """Return a tiny GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def words(seed):
    """Return samples of a language."""
    rows = torch.randint(
        11, (SAMPLES, 8), generator=torch.Generator().manual_seed(seed)
    )
    return [{"input_ids": row, "labels": row} for row in rows]


def zeros(model, masks):
    """Return whether all pruned weights are zero."""
    return all(not model.get_parameter(n)[~mask].any() for n, mask in masks.items())


def accelerated(seed):
    """Prune a prepared model and train it; then one rank fails."""
    from accelerate import Accelerator

    from fisherprune.integrations.accelerate import Pruning

    accelerator, net = Accelerator(cpu=True), network(seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=0.1)
    parts = net, optimizer, DataLoader(images(seed), 2)
    model, optimizer, loader = accelerator.prepare(*parts)
    pruning = Pruning(accelerator, model, optimizer)
    pruning.prune(loader, "fts", 0.8)
    clean = True
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        clean &= all(
            not net.get_parameter(n).grad[~mask].any()
            for n, mask in pruning.masks.items()
        )
        optimizer.step()
        clean &= zeros(net, pruning.masks)
    before, masks = [p.clone() for p in net.parameters()], pruning.masks
    few = 3 - accelerator.process_index
    wrong = [(x[:, :few], y) for x, y in DataLoader(images(seed), 2)]
    told = ""
    try:
        pruning.prune(wrong)
    except fp.FisherpruneError as error:
        told = f"{error}"
    same = all(map(torch.equal, net.parameters(), before)) and pruning.masks is masks
    facts = {"clean": clean, "even": loader.batch_sampler.even_batches, "same": same}
    return {**facts, "masks": dict(masks), "told": told}


def transformed(seed, folder):
    """Train with the Trainer of transformers."""
    from transformers import Trainer, TrainingArguments

    from fisherprune.integrations.transformers import PruningCallback

    options = {"save_strategy": "no", "report_to": "none", "use_cpu": True}
    options |= {"per_device_train_batch_size": 2, "num_train_epochs": 2}
    args = TrainingArguments(folder, ddp_backend="gloo", disable_tqdm=True, **options)
    callback = PruningCallback("fts", 0.8)
    model, data = language(seed), words(seed)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
    trainer.train()
    return {"masks": dict(callback.masks), "clean": zeros(model, callback.masks)}


def lightened(seed):
    """Train with the Trainer of Lightning."""
    from lightning.pytorch import LightningModule, Trainer

    from fisherprune.integrations.lightning import PruningCallback

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.before = network(seed), {}

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            return cross_entropy(self(batch[0]), batch[1])

        def on_train_epoch_end(self):
            if not self.before:
                state = self.net.state_dict()
                self.before = {n: t.clone() for n, t in state.items()}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05, 0.9, weight_decay=0.1)

    net, callback = Net(), PruningCallback("fts", 0.8, after_epochs=1)
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar"]
    how = dict.fromkeys([*quiet, "enable_model_summary"], False)
    how |= {"accelerator": "cpu", "devices": RANKS, "strategy": "ddp"}
    trainer = Trainer(callbacks=[callback], max_epochs=2, **how)
    trainer.fit(net, DataLoader(images(seed, EVEN), 2))
    facts = {"clean": zeros(net, callback.masks), "before": net.before}
    return {**facts, "masks": dict(callback.masks)}


def run_rank(rank, seed, folder):
    """Be a rank: what comes of each door is saved."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{RANKS}"}
    os.environ |= {"MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": f"{RANKS}"}
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=SECONDS),
    )
    saved = {"accelerate": accelerated(seed), "lightning": lightened(seed)}
    saved["transformers"] = transformed(seed, folder)
    torch.save(saved, f"{folder}/{rank}.pt")


def run_job(seed, folder):
    """Return what each rank saved; a hang ends the job."""
    context = multiprocessing.get_context("forkserver")
    libraries = "accelerate", "lightning.pytorch", "transformers.trainer"
    context.set_forkserver_preload(["doors_job", *libraries])
    ranks = [
        context.Process(target=run_rank, args=(r, seed, f"{folder}"))
        for r in range(RANKS)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(SECONDS)
    hang = [i for i, each in enumerate(ranks) if each.is_alive()]
    for each in ranks:
        each.kill()
        each.join()
    assert not hang, f"ranks {hang} hang"
    assert [each.exitcode for each in ranks] == [0] * RANKS
    return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(RANKS)]
