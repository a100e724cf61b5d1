"""The page of the table."""

from __future__ import annotations


def page(record):
    return ""
