"""The parts of a run's configuration, each with its fields and their rules."""
