"""The README: its links lead somewhere, and it names every criterion."""

import re
from pathlib import Path

import pytest

from fisherprune.scoring.criteria import CRITERIA

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\]\(([^)#]+)", README)


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_to_files(link):
    assert (ROOT / link).exists()


def test_it_is_short():
    assert len(LINKS) > 10
    assert len(README.splitlines()) < 150


def test_it_names_every_criterion():
    for code, criterion in CRITERIA.items():
        if criterion.score.__module__ == "fisherprune.scoring.criteria":  # no test's
            assert code == "none" or f"`{code}`" in README
