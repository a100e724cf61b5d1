"""What tests of the passes ask again and again."""

from __future__ import annotations

import pytest
import truth

import fisherprune as fp


def assert_moments(found, expected, tolerance=1e-5):
    """Compare moments with {name: (m, F)}, each by the norm of its error."""
    for name, (mean, fisher) in expected.items():
        assert truth.relative_error(found.mean[name], mean) < tolerance, name
        assert truth.relative_error(found.fisher[name], fisher) < tolerance, name


def refused(model, x, y, match, **options):
    """Expect an error of the pass over one batch."""
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gradient_moments(model, [(x, y)], **options)
