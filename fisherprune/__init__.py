"""Exact pruning-at-initialization for PyTorch."""

from pkgutil import extend_path

# Run from a source folder, the package still finds the kernels of the installed one.
__path__ = extend_path(__path__, __name__)
