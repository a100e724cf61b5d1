"""The examples of docstrings."""

import doctest
import importlib
import inspect

import pytest

from fisherprune import ops, sparse


@pytest.mark.parametrize(
    "name",
    [
        *(f"sparse.{n}" for n in "compress layers optimizers packing saving".split()),
        *("sparse.semi_structured", "sparse.shrink", "ops.sparse"),
    ],
)
def test_examples_show_what_comes(name):
    result = doctest.testmod(importlib.import_module(f"fisherprune.{name}"))
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", sparse.__all__)
def test_what_is_public_has_an_example(name):
    text = inspect.getdoc(getattr(sparse, name))
    assert "Example:" in text


def test_ops_have_docstrings():
    for name in ("sparse_conv2d", "sparse_conv2d_input", "sparse_conv2d_weight"):
        assert "Raises:" in inspect.getdoc(getattr(ops, name))
