"""A page for each command, from its real parser."""

import argparse
import contextlib
from collections.abc import Iterator
from importlib import import_module
from unittest import mock

from sphinx.application import Sphinx
from written import write_pages

from fisherprune.__main__ import COMMANDS
from fisherprune.commandline import Parser


def setup(app: Sphinx) -> dict:
    """Write the pages before any page is read."""
    app.connect("builder-inited", lambda app: write_pages("commands", pages()))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def pages() -> dict[str, str]:
    """Return the pages by file name."""
    return {
        f"{i:02}_{name}.md": page(name, parser_of(module))
        for i, (name, (module, _)) in enumerate(COMMANDS.items())
    }


def parser_of(module: str) -> Parser:
    """Return the parser that a command builds, whose help ``--help`` would print."""
    shown: list[Parser] = []
    keep = mock.patch.object(Parser, "print_help", lambda parser: shown.append(parser))
    with keep, contextlib.suppress(SystemExit):
        import_module(module).main(["--help"])
    return shown[0]


def page(name: str, parser: Parser) -> str:
    """Return the page of a command and of its subcommands."""
    lines = [f"# fisherprune {name}", "", *body(parser)]
    for sub in subcommands(parser):
        lines += [f"## {sub.prog.split()[-1]}", "", *body(sub)]
    return "\n".join(lines) + "\n"


def body(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield description and options."""
    yield from described(parser.description or "")
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if is_shown(a)]
        if actions:
            title = (group.title or "").capitalize()
            yield from ("", f":::{{rubric}} {title}", ":::", "")
            for action in actions:
                yield from option(action)


def is_shown(action: argparse.Action) -> bool:
    """Return whether an action is an option or an argument with a help."""
    kinds = argparse._HelpAction, argparse._SubParsersAction
    return not isinstance(action, kinds) and action.help is not argparse.SUPPRESS


def described(text: str) -> Iterator[str]:
    """Yield a description: indented lines are commands."""
    code = False
    for line in text.splitlines():
        if line.startswith("  ") != code:
            code = not code
            yield "```console" if code else "```"
        yield line.removeprefix("  ") if code else escaped(line)
    if code:
        yield "```"


def option(action: argparse.Action) -> Iterator[str]:
    """Yield an entry of the list of options."""
    formatter = argparse.HelpFormatter("")
    text = formatter._expand_help(action) if action.help else ""
    required = " (required)" if action.required and action.option_strings else ""
    yield f"`{formatter._format_action_invocation(action)}`"
    yield f": {escaped(' '.join(text.split()))}{required}"
    yield ""


def escaped(text: str) -> str:
    """Return text whose characters stand for themselves."""
    for sign in "\\`*_<[$":
        text = text.replace(sign, f"\\{sign}")
    return text


def subcommands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of a parser's commands."""
    return [
        sub
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for sub in action.choices.values()
    ]
