"""A run that trains without its pruned weights does the run of dense layers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from trainings import images_of, rows, small_run, stopped
from truth import relative_error

from fisherprune import Masks, models, train
from fisherprune.errors import FisherpruneError
from fisherprune.parameters import prunable_parameters
from fisherprune.runs.reader import read_run
from fisherprune.runs.words import table
from fisherprune.train import sparsely
from fisherprune.train.sparsely import expectation

pytestmark = pytest.mark.usefixtures("one_thread")


def sparse_run(folder, **fields):
    given = {"sparsity": 0.95, "epochs": 2, "warmup_epochs": 1, "sparse": "on"}
    given |= {"lr": 1e-3, "lr_drops": (), "batch_size": 20}
    return small_run(output_dir=str(folder), **given | fields)


def weights(result, name="last"):
    return load_file(result.folder / f"{name}.safetensors")


def assert_close(found, expected, error):
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert relative_error(found[name], each.double()) < error, name


def assert_near(found, expected, amp):
    """Compare states; of bfloat16 no biases: they are little but rounding yet."""
    if amp:
        found, expected = (
            {n: t for n, t in each.items() if n.endswith("weight")}
            for each in (found, expected)
        )
    assert_close(found, expected, 3e-2 if amp else 1e-4)


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "bfloat16"])
def both(tmp_path_factory, request):
    """Return the results of a sparse run and of a dense one."""
    config = sparse_run(tmp_path_factory.mktemp("runs"), amp=request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = [train.run(replace(config, sparse=s), quiet=True) for s in ("on", "off")]
    torch.set_num_threads(threads)
    return results


def test_it_is_that_of_dense_layers_up_to_rounding(both):
    sparse, dense = both
    masks = [Masks.load(r.folder / "masks.safetensors") for r in both]
    assert masks[0] == masks[1]
    near = 0.1 if sparse.config.amp else 2e-2
    for name in ("last", "best"):
        assert_near(weights(sparse, name), weights(dense, name), sparse.config.amp)
    for ours, theirs in zip(rows(sparse.folder), rows(dense.folder), strict=True):
        for column in ours.keys() - {"phase", "seconds"}:
            assert float(ours[column]) == pytest.approx(float(theirs[column]), abs=near)
    assert sparse.layers == dense.layers and sparse.flops == dense.flops


def test_the_result_tells_what_was_saved(both, tmp_path):
    sparse, dense = both
    assert dense.execution is None and "sparse training" not in table(dense)
    execution = sparse.execution
    kept, total = sparse.kept, sparse.total
    assert execution["dense_weights"] == 4 * sparse.parameters
    assert execution["weights"] < 4 * (sparse.parameters - total + kept) + 4 * total / 5
    assert execution["optimizer"] == execution["weights"]
    assert execution["dense_optimizer"] == execution["dense_weights"]
    assert execution["dense_step"] > 0 and execution["sparse_step"] > 0
    text = table(sparse)
    assert ("sparse training in bfloat16, " in text) == sparse.config.amp
    assert f"{execution['sparse_layers']} sparse layers" in text
    assert "times faster" in text
    path = sparse.folder / "results.json"
    assert read_run(path, "run").execution == execution
    content = json.loads(path.read_text())
    content["execution"]["weights"] = -1
    other = tmp_path / "results.json"
    other.write_text(json.dumps(content))
    with pytest.raises(Exception, match="execution.weights must be"):
        read_run(other, "run")


@pytest.mark.parametrize("checkpoint", [2, 3])
def test_a_stopped_run_ends_in_the_same_bits(both, checkpoint, tmp_path):
    config = both[0].config
    stopped(config, tmp_path, checkpoint)
    again = train.run(config, folder=tmp_path, quiet=True)
    assert rows(again.folder) == rows(both[0].folder)
    for name in ("masks", "last", "best"):
        found, first = weights(again, name), weights(both[0], name)
        assert all(torch.equal(found[n], first[n]) for n in found | first)


def test_several_processes(both, tmp_path):
    config = replace(both[0].config, processes=2, output_dir=str(tmp_path))
    found = train.run(config, quiet=True)
    assert found.execution["sparse_layers"] == both[0].execution["sparse_layers"]
    assert found.execution["dense_step"] is None
    assert "by an estimate" in table(found)
    if config.amp:  # in bfloat16 masks, too, depend on how many warm up
        both = [found, train.run(replace(config, sparse="off"), quiet=True)]
    assert_near(weights(found), weights(both[1]), config.amp)


@pytest.mark.parametrize(
    "fields, sparsity, expected",
    [
        ({"sparse": "auto"}, 0.99, True),
        ({"sparse": "auto"}, 0.0, False),
        ({"sparse": "on"}, 0.0, True),
        ({"sparse": "off"}, 0.99, False),
        ({"sparse": "auto", "amp": True}, 0.99, True),
        ({"sparse": "auto", "amp": True}, 0.0, False),
        ({"sparse": "auto", "compile": True}, 0.99, False),
        ({"sparse": "on", "amp": True}, 0.99, True),
    ],
)
def test_when_a_run_is_sparse(fields, sparsity, expected, tmp_path):
    config = sparse_run(tmp_path, **fields)
    model = models.create("resnet18", seed=0)
    named = prunable_parameters(model).items()
    masks = Masks({n: torch.rand(p.shape) >= sparsity for n, p in named})
    image = torch.zeros(128, 3, 32, 32)
    assert (expectation(config, model, masks, image) is not None) == expected
    assert expectation(config, model, None, image) is None


def test_masks_that_prune_too_little_for_sparse_layers(tmp_path):
    fields = {"epochs": 1, "warmup_epochs": 0, "ties": "position"}
    config = sparse_run(tmp_path, sparsity=0.002, **fields)
    result = train.run(config, quiet=True)
    assert result.execution["sparse_layers"] == 0
    dense = train.run(replace(config, sparse="off"), quiet=True)
    assert_close(weights(result), weights(dense), 1e-4)


def test_compiled_and_sparse_is_refused(tmp_path):
    message = "sparse must be auto or off with compile, got on"
    with pytest.raises(Exception, match=f"^{message}$"):
        sparse_run(tmp_path, compile=True)


def test_images_decide_what_is_expected(tmp_path):
    config = sparse_run(tmp_path, sparse="on")
    image = images_of(config).train
    model = models.create("resnet20", seed=0, in_channels=1)
    named = prunable_parameters(model).items()
    few = Masks({n: torch.rand(p.shape) < 0.01 for n, p in named})
    many = Masks({n: torch.rand(p.shape) < 0.2 for n, p in named})
    one = image.normalize(image.images[:1])
    found = [expectation(config, model, masks, one) for masks in (few, many)]
    assert found[0] > found[1] > 0


OWN_MODEL = """
import torch
from torch import nn


class Watched(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU())
        self.first = nn.Conv2d(64, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        self.second.weight.register_hook(torch.clone)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        x = self.second(self.first(input=self.body(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


def watched(num_classes, in_channels):
    torch.manual_seed(0)
    return Watched(num_classes)
"""


def test_weights_that_no_sparse_layer_can_have_stay_dense(tmp_path, monkeypatch):
    monkeypatch.setattr(sparsely, "PAYS", 0.0)  # images so small never pay
    path = tmp_path / "own.py"
    path.write_text(OWN_MODEL)
    fields = {"model": f"{path}:watched", "epochs": 1, "warmup_epochs": 0}
    fields |= {"method": "random"}
    config = sparse_run(tmp_path, sparse="auto", **fields)
    assert train.run(config, quiet=True).execution is None
    with pytest.raises(FisherpruneError, match="compress: .* hook"):
        train.run(replace(config, sparse="on"), quiet=True)
