"""The examples of docstrings."""

import doctest
import inspect

import pytest

import fisherprune as fp
from fisherprune import parameters
from fisherprune.masks import counts, hold, masks, plan, select
from fisherprune.masks.masks import Masks


@pytest.mark.parametrize(
    "module",
    [counts, hold, masks, plan, select, parameters, inspect.getmodule(fp.prune)],
)
def test_examples_show_what_comes(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    "public",
    [
        *(
            Masks,
            Masks.apply_,
            Masks.hold,
            hold.Hold.update,
            Masks.save,
            Masks.load,
            Masks.to,
            Masks.jaccard,
        ),
        *(
            Masks.kept,
            Masks.total,
            Masks.sparsity,
            Masks.density,
            Masks.jaccard_by_layer,
        ),
        *(
            select.select_masks,
            plan.Plan,
            parameters.transposed_names,
            counts.keep_count,
            parameters.prunable_parameters,
            fp.prune,
        ),
    ],
    ids=lambda public: public.__qualname__,
)
def test_what_is_public_has_an_example(public):
    assert ">>>" in inspect.getdoc(public)
