"""What importing the package does, and what it leaves alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typed import checked

import fisherprune as fp

SOURCE = Path(fp.__file__).parents[1]
FACTS = """
import json, signal, sys
before = [list(sys.path), list(map(str, map(signal.getsignal, signal.valid_signals())))]
{}
after = [list(sys.path), list(map(str, map(signal.getsignal, signal.valid_signals())))]
import fisherprune
facts = [before == after, list(fisherprune.__path__), sorted(sys.modules)]
print(json.dumps(facts))
"""


def facts_after(statement):
    done = subprocess.run(
        [sys.executable, "-c", FACTS.format(statement)],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "statement",
    [
        "import fisherprune",
        "from fisherprune import prune",
        "from fisherprune import *",
    ],
)
def test_nothing_is_changed_and_nothing_else_is_imported(statement):
    same, path, modules = facts_after(statement)
    assert same and path == [str(SOURCE / "fisherprune")]
    others = {*"torchvision sklearn PIL matplotlib tqdm jinja2 ray".split()}
    of_torch = set(facts_after("import torch")[2])  # tqdm, where it is installed
    assert not {*modules} & others - of_torch
    assert ("torch" in modules) == (statement != "import fisherprune")


def test_every_public_name_is_there():
    assert set(fp.__all__) <= set(dir(fp))
    assert "__version__" in dir(fp)
    for name in fp.__all__:
        thing = getattr(fp, name)
        assert thing.__name__ in (name, f"fisherprune.{name}")
    assert callable(fp.prune)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'fisherprune' has no attribute 'prun'"):
        fp.prun  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'prun'"):
        from fisherprune import prun  # noqa: F401


def test_type_checkers_know_every_public_name(tmp_path):
    pytest.importorskip("mypy")
    uses = "\n".join(f"reveal_type(fp.{name})" for name in fp.__all__)
    (tmp_path / "use.py").write_text(
        "import fisherprune as fp\nfrom fisherprune.models import resnet18\n"
        f"resnet18(num_classes=3)\n{uses}\nfp.prun\n"
    )
    code, out = checked(tmp_path / "use.py")
    errors = [line for line in out.splitlines() if ": error:" in line]
    assert len(errors) == 1 and 'has no attribute "prun"' in errors[0], out
    assert out.count("Revealed type") == len(fp.__all__)
    assert code == 1 and 'is "Any"' not in out
