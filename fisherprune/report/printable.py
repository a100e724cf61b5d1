"""Texts from files and names of folders, made safe to show."""

from __future__ import annotations


def printable(value: object) -> str:
    r"""Return a text in which every character can be seen and encoded.

    Names and files may hold bytes that are no UTF-8 and control characters, which a
    terminal would obey. They appear as in Python's source: ``\x1b``, ``\udcff``. Line
    breaks and tabulators stay.
    """
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in str(value)
    )


def one_line(value: object) -> str:
    """Return a printable text without line breaks."""
    return " ".join(printable(value).split())
