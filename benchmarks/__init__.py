"""Benchmarks against pure PyTorch and the peers; raw results in ``results/``."""
