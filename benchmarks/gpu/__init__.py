"""What needs a GPU: tests, numbers beside their targets, profiles, sanitizers."""
