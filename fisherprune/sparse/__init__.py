"""Execution of masked networks without their zeros."""
