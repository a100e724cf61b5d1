"""The examples of the losses' docstrings."""

import doctest
import importlib
import inspect

import pytest

import fisherprune as fp


@pytest.mark.parametrize("module", ["cross_entropy", "elementwise", "own"])
def test_examples_show_what_comes(module):
    if module == "own":
        pytest.importorskip("transformers")
    result = doctest.testmod(importlib.import_module(f"fisherprune.losses.{module}"))
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", fp.losses.__all__)
def test_each_loss_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(fp.losses, name))
