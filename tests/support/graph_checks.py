"""Moments with graphs and without, and whether they are the same."""

import copy
import warnings

import torch

import fisherprune as fp


def every(model):
    return dict(model.named_parameters())


def both(model, some, pick=every, **options):
    """Return moments with graphs and without, and what was warned of."""
    found, texts = [], []
    for graph in (True, False):
        own = copy.deepcopy(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options |= {"parameters": pick(own), "cuda_graph": graph}
            found.append(fp.gradient_moments(own, some, **options))
        ours = [w for w in caught if issubclass(w.category, fp.FisherpruneWarning)]
        texts.append([f"{each.message}" for each in ours])
    return *found, [text for text in texts[0] if text not in texts[1]]


def assert_same(found, expected):
    assert found.samples == expected.samples and found.groups == expected.groups
    assert found.paths == expected.paths and found.exponent == expected.exponent
    for name, sum in expected.sum.items():
        assert torch.equal(found.sum[name], sum), name
        assert torch.equal(found.sum_sq[name], expected.sum_sq[name]), name
