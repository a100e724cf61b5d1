"""The documentation builds without a warning, and holds what it is made from."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fisherprune as fp
from fisherprune.__main__ import COMMANDS
from fisherprune.scoring.criteria import CRITERIA

ROOT = Path(__file__).parents[2]
LOADED = re.compile(r'<(?:link|script|img|iframe)\b[^>]*\b(?:src|href)="(https?:[^"]*)')

for package in ("sphinx", "furo", "myst_parser"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the text of each page; examples are not run, they have their tests."""
    place = tmp_path_factory.mktemp("docs")
    options = ["-q", "-W", "--keep-going", "-D", "run_examples=0"]
    command = [*options, "-d", place / "trees", ROOT / "docs", place / "html"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {
        str(path.relative_to(place / "html")): path.read_text(encoding="utf-8")
        for path in (place / "html").rglob("*.html")
    }


def words(page):
    """Return what a page says, without its tags."""
    return html.unescape(re.sub("<[^>]*>", "", page))


def test_pages_load_nothing_from_elsewhere(site):
    assert len(site) > 20
    for text in site.values():
        assert LOADED.findall(text) == []
        assert "@import" not in text


def test_every_public_name_is_in_the_reference(site):
    pages = "".join(t for name, t in site.items() if name.startswith("generated/api"))
    for name in fp.__all__:
        ids = {f'id="fisherprune.{name}"', f'id="module-fisherprune.{name}"'}
        assert any(each in pages for each in ids), name


def test_every_criterion_is_in_the_table(site):
    page = site["reference/criteria.html"]
    _, table = re.findall("<tbody>(.*?)</tbody>", page, re.DOTALL)
    for code, each in CRITERIA.items():
        if each.score.__module__ == "fisherprune.scoring.criteria":  # no test's
            assert f">{code}<" in table


def test_every_command_has_its_options(site):
    from fisherprune.runs.config import TrainConfig
    from fisherprune.runs.option import about

    for i, name in enumerate(COMMANDS):
        assert f"fisherprune {name}" in site[f"generated/commands/{i:02}_{name}.html"]
    page = html.unescape(
        re.sub("<[^>]*>", "", site["generated/commands/00_train.html"])
    )
    for field in TrainConfig.__dataclass_fields__.values():
        if about(field).given:
            assert f"--{field.name.replace('_', '-')}" in page


def test_every_example_has_its_page(site):
    for path in (ROOT / "examples").glob("*.py"):
        page = site[f"generated/examples/{path.stem.strip('_')}.html"]
        last = path.read_text(encoding="utf-8").split()[-1]
        assert last in words(page)


def test_examples_are_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    example_pages = pytest.importorskip("example_pages")

    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("print('seen')\n")
    bad.write_text("raise SystemExit('broken')\n")
    assert example_pages.output_of(good) == "seen\n"
    with pytest.raises(Exception, match="bad.py failed:\nbroken"):
        example_pages.output_of(bad)
