"""Which models are covered, in which ways, with what error: ``docs/models.md``."""
