"""Studies from end to end, and which of their runs are the same."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fisherprune.experiments.__main__ import main
from fisherprune.runs.identity import identity

REFERENCE = Path(__file__).parents[2] / "studies" / "reference"


pytestmark = pytest.mark.usefixtures("one_thread")


def test_identity_is_that_of_the_run_not_of_its_circumstances(runs):
    config = runs["fts"].config
    assert identity(replace(config, device="auto", data_dir="x")) == identity(config)
    assert identity(replace(config, batch_size=16)) == identity(config)
    assert identity(replace(config, lr=1)) == identity(replace(config, lr=1.0))
    assert identity(replace(config, seed=1)) != identity(config)
    there, here = (replace(config, dataset="folder", data_dir=d) for d in "xy")
    assert identity(there) != identity(here)


@pytest.fixture
def pictures(tmp_path):
    """Return a folder of ten classes of a few small images."""
    for part, number in (("train", 5), ("test", 1)):
        for label in range(10):
            folder = tmp_path / "pictures" / part / str(label)
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "pictures"


def test_the_ten_published_files_run(tmp_path, pictures):
    (tmp_path / "configs").mkdir()
    for path in REFERENCE.glob("*.json"):  # as they are, but for size
        content = json.loads(path.read_text())
        content["dataset"]["class"] = "folder"
        content["model"]["class"] = "ResNet20"
        content["training"]["num_steps"] = 1
        (tmp_path / "configs" / path.name).write_text(json.dumps(content))
    output = tmp_path / "out"
    places = ["--output", str(output), "--data-dir", str(pictures)]
    assert main(["run", str(tmp_path / "configs"), *places, "--quiet"]) == 0
    results = [json.loads(p.read_text()) for p in output.glob("runs/*/results.json")]
    assert len(results) == 10
    for result in results:
        wanted = 0 if result["config"]["method"] == "none" else 0.9
        assert math.isclose(result["sparsity"], wanted, abs_tol=1e-2)
