"""``fisherprune fisher``: a model of the user's, its data, and the file of moments."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fisherprune as fp
from fisherprune.__main__ import main as fisherprune
from fisherprune.fisher.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
from torch import nn

def small(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes),
    )
"""


class Case:
    """A model with weights, a batch file, and a folder of the same images."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "nets.py").write_text(SOURCE)
        space = {}
        exec(SOURCE, space)
        self.model = space["small"](3, 3).eval()
        self.model[1].running_var.uniform_(0.5, 2)
        self.state = dict(self.model.state_dict())
        save_file(self.state, folder / "w.safetensors")
        torch.save(self.state, folder / "w.pt")
        self.labels = torch.arange(3).repeat_interleave(torch.tensor([5, 4, 2]))
        self.pixels = torch.randint(256, (11, 3, 12, 12), dtype=torch.uint8)
        for i, (image, label) in enumerate(zip(self.pixels, self.labels, strict=True)):
            path = folder / "images" / "abc"[label] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image.permute(1, 2, 0))).save(path)
        mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])
        self.inputs = self.pixels / 255 - mean.view(-1, 1, 1)
        self.inputs /= std.view(-1, 1, 1)
        tensors = {"inputs": self.inputs, "labels": self.labels}
        save_file(tensors, folder / "batch.safetensors")
        torch.save(tensors, folder / "batch.pt")

    def arguments(self, *options, data="batch.safetensors", weights="w.safetensors"):
        start = ["--model", self.folder / "nets.py:small", "--device", "cpu"]
        if weights:
            start += ["--weights", self.folder / weights]
        if data == "images":
            start += ["--images", self.folder / "images", "--image-size", 12]
            start += ["--mean", 0.4, 0.5, 0.6, "--std", 0.1, 0.2, 0.3]
        else:
            start += ["--data", self.folder / data]
        every = [*start, "--output", self.folder / "f.safetensors", *options]
        return [str(each) for each in every]

    def run(self, *options, **files):
        assert main(self.arguments(*options, **files)) == 0
        return fp.GradientMoments.load(self.folder / "f.safetensors")


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERPRUNE_CACHE", str(tmp_path / "cache"))
    return Case(tmp_path)


@pytest.mark.parametrize("data", ["images", "batch.safetensors", "batch.pt"])
@pytest.mark.parametrize("weights", ["w.safetensors", "w.pt"])
def test_moments_are_those_of_the_model_and_the_data(case, data, weights):
    found = case.run("--all-parameters", "--batch-size", 4, data=data, weights=weights)
    every = dict(case.model.named_parameters())
    batch = [(case.inputs, case.labels)]
    expected = fp.gradient_moments(case.model, batch, parameters=every)
    assert (found.samples, found.groups, found.labels) == (11, 11, "given")
    assert list(found.fisher) == list(every)
    for name in every:
        torch.testing.assert_close(found.fisher[name], expected.fisher[name])
        torch.testing.assert_close(found.mean[name], expected.mean[name])


def test_options_are_those_of_gradient_moments(case):
    options = "--group-size", 2, "--labels", "sampled", "--draws", 3, "--samples", 7
    found = case.run(*options)
    assert (found.samples, found.groups, found.group_size) == (7, 4, 2)
    assert found.labels == "sampled" and list(found.sum) == ["0.weight"]
    again, other = case.run(*options), case.run(*options, "--seed", 1)
    assert torch.equal(found.sum_sq["0.weight"], again.sum_sq["0.weight"])
    assert not torch.equal(found.sum_sq["0.weight"], other.sum_sq["0.weight"])
    facts = [each.provenance[0]["data"]["fingerprint"] for each in (found, other)]
    assert facts[0] != facts[1]


def test_where_sums_are_kept_changes_no_bit(case):
    every = "--all-parameters", "--group-size", 2
    expected = case.run(*every)
    largest = max(s.numel() for s in expected.sum.values())
    limit = "--max-accumulator-bytes", 28 * largest
    for place in (limit, ("--offload", "cpu"), (*limit, "--offload", case.folder)):
        found = case.run(*every, *place)
        for name, square in expected.sum_sq.items():
            assert torch.equal(found.sum_sq[name], square)
            assert torch.equal(found.sum[name], expected.sum[name])


def test_sampled_labels_depend_on_the_seed(case):
    spoiled_data(case, inputs=case.inputs[:1], labels=case.labels[:1] + 2)
    options = "--labels", "sampled", "--seed"
    found = [case.run(*options, seed, data="batch.pt") for seed in range(20)]
    squares = {tuple(each.sum_sq["0.weight"].flatten().tolist()) for each in found}
    assert 1 < len(squares) <= 3  # one for each class that was drawn


def test_the_file_says_what_it_is_of(case):
    (about,) = case.run(weights="w.pt", data="images").provenance
    digest = hashlib.sha256((case.folder / "w.pt").read_bytes()).hexdigest()
    assert about["weights"]["sha256"] == digest
    assert about["weights"]["file"] == "w.pt"
    assert about["data"]["classes"] == ["a", "b", "c"]
    assert about["data"]["samples"] == 11
    assert (about["loss"], about["parameters"]) == ("cross-entropy", "prunable")
    assert about["environment"]["torch"] == torch.__version__
    assert about["model"].endswith("nets.py:small") and about["model_source"]
    (other,) = case.run().provenance
    assert other["weights"]["fingerprint"] == about["weights"]["fingerprint"]
    (unloaded,) = case.run(weights=None).provenance
    assert unloaded["weights"]["fingerprint"] != about["weights"]["fingerprint"]


def test_the_table_has_a_row_for_each_layer(case, capsys):
    with torch.no_grad():
        case.state["0.weight"][:1] = 0
        case.state["1.bias"][:1] = -100  # the unit never fires
    torch.save(case.state, case.folder / "w.pt")
    found = case.run("--all-parameters", weights="w.pt")
    head, *rows, total, last = capsys.readouterr().out.splitlines()
    assert head.split() == "layer weights mean F F = 0 way".split()
    assert [row.split()[:2] for row in rows] == [["0", "112"], ["1", "8"], ["5", "15"]]
    assert rows[0].split()[3:] == ["25.0%", "conv2d"]
    mean = torch.cat([found.fisher[f"0.{n}"].flatten() for n in ("weight", "bias")])
    assert float(rows[0].split()[2]) == pytest.approx(float(mean.mean()), rel=1e-3)
    assert total.split()[:2] == ["all", "135"]
    assert last.endswith("f.safetensors: 11 samples in 11 groups of 1, given labels")


def test_wrapped_names_and_nested_states_are_read(case):
    state = {f"module.{name}": tensor for name, tensor in case.state.items()}
    torch.save({"state_dict": state, "epoch": 3}, case.folder / "w.pt")
    found, expected = case.run(weights="w.pt"), case.run()
    assert torch.equal(found.sum["0.weight"], expected.sum["0.weight"])


def spoiled_weights(case, **changes):
    torch.save(case.state | changes, case.folder / "w.pt")
    return case.arguments(weights="w.pt")


def spoiled_data(case, **changes):
    content = {"inputs": case.inputs, "labels": case.labels} | changes
    torch.save(content, case.folder / "batch.pt")
    return case.arguments(data="batch.pt")


MISTAKES = {
    "no weights": (
        lambda c: c.arguments(weights="x.pt"),
        "weights must be a file of tensors, got .*x.pt, which is none",
    ),
    "other weights": (
        lambda c: spoiled_weights(c, **{"9.bias": torch.ones(1)}),
        "weights must be those of the model, got .*w.pt with 1 names in one.*9.bias",
    ),
    "other shape": (
        lambda c: spoiled_weights(c, **{"5.bias": torch.ones(7)}),
        r"weights must be those of the model, 5.bias of shape \[3\], got .* with \[7\]",
    ),
    "no tensors": (
        lambda c: spoiled_weights(c, epoch=3),
        "weights must be a file of tensors by name, got .*w.pt, which holds something",
    ),
    "code": (
        lambda c: spoiled_weights(c, model=nn.Linear(2, 2)),
        "weights .*w.pt can't be read: ",
    ),
    "more in the batch": (
        lambda c: spoiled_data(c, other=torch.ones(1)),
        "batch.pt must be a file of the tensors inputs and labels, got .*'other'",
    ),
    "flat inputs": (
        lambda c: spoiled_data(c, inputs=torch.ones(11, 4)),
        r"inputs must be floating-point images \[N, C, S, S\].*got float32 \[11, 4\]",
    ),
    "labels": (
        lambda c: spoiled_data(c, labels=torch.ones(11)),
        r"labels must be integers \[11\], got float32 \[11\]",
    ),
    "negative labels": (
        lambda c: spoiled_data(c, labels=c.labels - 1),
        "labels must be classes, counted from 0",
    ),
    "few classes": (
        lambda c: c.arguments("--classes", 2),
        "classes must be at least 3, as many as the data have, got 2",
    ),
    "draws": (
        lambda c: c.arguments("--draws", 2),
        "draws must be 1 where labels are given, got 2",
    ),
    "std": (
        lambda c: c.arguments("--std", 1, 0, 1),
        r"std must be finite numbers above 0, got \[1.0, 0.0, 1.0\]",
    ),
    "mean": (
        lambda c: c.arguments("--mean", 1, "nan", 1),
        r"mean must be finite numbers, got \[1.0, nan, 1.0\]",
    ),
    "device": (lambda c: c.arguments("--device", "gpu"), "device must be auto, cpu"),
    "samples": (lambda c: c.arguments("--samples", 12), "samples must be at most the"),
    "group size": (
        lambda c: c.arguments("--group-size", 0),
        "group_size must be an integer of at least 1, got 0",
    ),
    "limit": (
        lambda c: c.arguments("--max-accumulator-bytes", 0),
        "max_accumulator_bytes must be an integer of at least 1, got 0",
    ),
    "offload": (
        lambda c: c.arguments("--offload", "cuda"),
        "offload must be None, 'cpu' or a folder that is there, got 'cuda'",
    ),
    "no folder": (
        lambda c: ["--model", "resnet20", "--images", "nowhere", "--output", "f"],
        "folder dataset: nowhere must be a folder, got none",
    ),
    "a folder": (
        lambda c: [*c.arguments(), "--output", str(c.folder)],
        "output must be a file, got the folder ",
    ),
    "no data": (
        lambda c: ["--model", "resnet20", "--output", "f"],
        "one of the arguments --images --data is required",
    ),
    "two data": (
        lambda c: c.arguments("--images", "a"),
        "argument --images: not allowed with argument --data",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line(case, mistake, what):
    make, match = MISTAKES[what]
    line = mistake(main, *make(case))
    assert line.startswith("fisherprune.fisher: error: ")
    with pytest.raises(ValueError, match=match):
        raise ValueError(line)
    assert not (case.folder / "f.safetensors").exists()


def test_a_folder_without_classes(case, mistake, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = "--model", "resnet20", "--images", tmp_path / "empty", "--output", "f"
    assert "empty must hold class folders, got none" in mistake(main, *arguments)


def test_help(capsys):
    with pytest.raises(SystemExit):
        fisherprune(["fisher", "--help"])
    out = capsys.readouterr().out
    assert "--all-parameters" in out and "%(" not in out
    assert max(map(len, out.splitlines())) <= 88
