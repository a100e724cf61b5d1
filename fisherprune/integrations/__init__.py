"""Doors to other libraries: one file for each, which imports its library itself."""
