"""Two processes prune with each door to a training loop as one process does."""

import doors_job as job
import pytest
import torch
from torch.utils.data import DataLoader

import fisherprune as fp

for module in ("accelerate", "lightning.pytorch", "transformers"):
    pytest.importorskip(module)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fisherprune.FisherpruneWarning"),
]


@pytest.fixture(scope="module")
def seed():
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    return seed


@pytest.fixture(scope="module")
def ranks(seed, tmp_path_factory):
    return job.run_job(seed, tmp_path_factory.mktemp("ranks"))


def masks_of_one(door, seed, before):
    """Return the masks that one process finds of all samples."""
    if door == "transformers":
        rows = torch.stack([row["input_ids"] for row in job.words(seed)])
        batches = [{"input_ids": rows, "labels": rows}]
        model, losses = job.language(seed), fp.losses.hugging_face
        return fp.find_masks(model, batches, "fts", [0.8], losses=losses)[0]
    model = job.network(seed)
    samples = job.SAMPLES if door == "accelerate" else job.EVEN
    if before:
        model.load_state_dict(before)
    batches = DataLoader(job.images(seed, samples), 3)
    return fp.find_masks(model, batches, "fts", [0.8])[0]


@pytest.mark.parametrize("door", ["accelerate", "lightning", "transformers"])
def test_all_processes_hold_the_masks_of_one_up_to_rounding(door, ranks, seed):
    """Also where there are more samples for one of them, and after an epoch."""
    first, second = (each[door] for each in ranks)
    assert fp.Masks(first["masks"]) == second["masks"]
    prefix = "net." if door == "lightning" else ""
    one = masks_of_one(door, seed, first.get("before"))
    assert {prefix + name for name in one} == first["masks"].keys()
    for name, mask in one.items():
        assert (first["masks"][prefix + name] != mask).sum() <= 2, name  # near-ties
    assert first["clean"] and second["clean"]


def test_the_loader_repeats_samples_again_for_the_training(ranks):
    assert all(each["accelerate"]["even"] for each in ranks)


def test_a_failure_in_one_process_changes_nothing_in_any(ranks):
    first, second = (each["accelerate"] for each in ranks)
    assert "the model failed on batch 0" in second["told"]
    assert first["told"] == f"process_group: rank 1 failed: {second['told']}"
    assert first["same"] and second["same"]
