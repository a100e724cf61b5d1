"""Every message that the page quotes is one of the sources'."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
ENTRY = re.compile(r"^(`[^\n]+`)\n: ", re.MULTILINE)
HOLES = re.compile(r"…| must be |, got ")
"""What a source writes as a variable, or what FieldError joins."""


def quoted():
    """Return the messages of the page."""
    found = ENTRY.findall(PAGE.read_text(encoding="utf-8"))
    return [text.strip("`") for text in found]


def texts_of(path):
    """Return the texts of a file in one: parts of an f-string are apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return "\n".join(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


@pytest.fixture(scope="module")
def sources():
    """Return the texts of all files."""
    return [texts_of(path) for path in (ROOT / "fisherprune").rglob("*.py")]


def is_quoted_from(message, text):
    """Return whether all constant parts of a message are in the texts of a file."""
    parts = [part.strip() for part in HOLES.split(message)]
    return all(part in text for part in parts)


def test_the_page_has_messages():
    assert len(quoted()) > 60
    assert len(set(quoted())) == len(quoted())


@pytest.mark.parametrize("message", quoted())
def test_the_sources_say_it(message, sources):
    assert any(is_quoted_from(message, text) for text in sources)


def test_a_message_that_is_gone_is_seen(sources):
    for message in ("samples mix: … a sample is odd", "sparsity must be a percentage"):
        assert not any(is_quoted_from(message, text) for text in sources)
