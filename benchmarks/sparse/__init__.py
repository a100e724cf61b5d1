"""Sparse execution against dense: layers, training steps, inference, memory, files."""
