"""The statistics passes: slow, and each written once."""
