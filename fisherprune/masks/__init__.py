"""Masks: which weights are kept, how many of them, and how they are held."""

from fisherprune.masks.masks import Masks
from fisherprune.masks.select import select_masks

__all__ = ["Masks", "select_masks"]
