"""Doors whose library is not installed."""

import importlib
import re
import sys

import pytest

import fisherprune as fp

DOORS = {
    "lightning": ["lightning", "pytorch_lightning"],
    "transformers": ["transformers"],
    "accelerate": ["accelerate"],
}


@pytest.mark.parametrize("door", DOORS)
def test_the_error_names_the_extra(door, monkeypatch):
    for module in DOORS[door]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"fisherprune.integrations.{door}", False)
    wanted = f"fisherprune.integrations.{door} needs {DOORS[door][-1]}, but "
    remedy = re.escape(f"pip install 'fisherprune[{door}]'")
    with pytest.raises(fp.FisherpruneError, match=f"{wanted}.*; {remedy}"):
        module = importlib.import_module(f"fisherprune.integrations.{door}")
        module.Pruning(None, None, None)  # Accelerate is needed at the first use
