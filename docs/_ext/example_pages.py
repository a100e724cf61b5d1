"""A page for each example: what it says, its code, and what it prints when run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from written import write_pages

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAMES = {"gpt": "GPT", "vit": "ViT", "rigl": "RigL", "laplace": "Laplace"}
"""Words of file names that titles write otherwise."""


def setup(app: Sphinx) -> dict:
    """Add the option, the directive, and write the pages before any page is read."""
    app.add_config_value("run_examples", True, "env", bool)
    app.add_directive("example-output", ExampleOutput)
    app.connect("builder-inited", lambda app: write_pages("examples", pages()))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def pages() -> dict[str, str]:
    """Return the pages by file name."""
    paths = sorted(EXAMPLES.glob("*.py"), key=lambda path: path.stem.strip("_"))
    return {f"{path.stem.strip('_')}.md": page(path) for path in paths}


def page(path: Path) -> str:
    """Return the page of an example."""
    words = path.stem.strip("_").split("_")
    title = " ".join(NAMES.get(word, word) for word in words)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text, file = ast.get_docstring(tree) or "", f"../../../examples/{path.name}"
    options = f":language: python\n:lines: {(tree.body[0].end_lineno or 0) + 2}-"
    code = f"```{{literalinclude}} {file}\n{options}\n```"
    parts = [f"# {title[0].upper()}{title[1:]}", myst(text), code]
    if not path.stem.startswith("_"):
        parts.append(f"```{{example-output}} {path.name}\n```")
    return "\n\n".join(parts) + "\n"


def myst(text: str) -> str:
    """Return a docstring in MyST: its commands are indented."""
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    return "\n".join(lines).replace("``", "`").strip()


class ExampleOutput(SphinxDirective):
    """What the example prints; nothing where examples are not run."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Run the example."""
        if not self.config.run_examples:
            return []
        text = output_of(EXAMPLES / self.arguments[0])
        command = f"$ python examples/{self.arguments[0]}\n{text}"
        return [nodes.literal_block(command, command, language="console")]


def output_of(path: Path) -> str:
    """Return what an example prints.

    Raises:
        ExtensionError: where it fails.
    """
    done = subprocess.run(
        [sys.executable, path.name],
        cwd=path.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ExtensionError(f"{path.name} failed:\n{done.stderr}")
    return done.stdout
