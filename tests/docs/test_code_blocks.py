"""The code of README and pages runs as it stands, and passes a strict type checker."""

import sys

import pytest
from page_blocks import code_of, failures, imported, missing, pages
from typed import checked

PAGES = pages()
TYPED = {"torch", "fisherprune", *sys.stdlib_module_names}
"""Other libraries have no types, or some that a strict checker does not accept."""


BROKEN = "text\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what went wrong, by page: all run from one process."""
    programs = {n: code_of(text) for n, text in (PAGES | {"broken.md": BROKEN}).items()}
    whole = {
        name: program for name, program in programs.items() if not missing(program)
    }
    return failures(whole, tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("page", PAGES)
def test_the_code_runs(page, found):
    if page not in found:
        pytest.skip(f"needs {missing(code_of(PAGES[page]))}")
    assert found[page] == ""


def test_what_fails_is_told_with_its_line(found):
    assert 'File "broken.md", line 8' in found["broken.md"]
    assert "AssertionError" in found["broken.md"]


def test_modules_that_are_missing_are_known():
    assert missing("import no_such_package.part as p") == {"no_such_package.part"}
    assert missing("from fisherprune.no_part import x") == {"fisherprune.no_part"}
    assert missing("import torch\nfrom os import path") == set()


def test_the_code_is_typed_strictly(tmp_path):
    pytest.importorskip("mypy")
    paths = []
    for name, text in PAGES.items():
        code = code_of(text)
        if {module.split(".")[0] for module in imported(code)} <= TYPED:
            paths.append(tmp_path / name.replace("/", "_").replace(".md", ".py"))
            paths[-1].write_text(code, encoding="utf-8")
    code, said = checked(*paths)
    assert code == 0, said
