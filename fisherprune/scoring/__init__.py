"""Criteria, formulas of weights and statistics, and how they are applied."""
