"""LSTM, GRU and RNN, rewritten by linear calls over all steps at once.

A step's gates are ``W_ih x_t + b_ih`` and ``W_hh h_{t-1} + b_hh``. Where all hidden
states are known, both are linear layers over T positions, whose per-sample gradients
are known: only the gradient of their outputs has to be found, backward through time.
"""

from fisherprune.persample.layers.recurrent import cells, stacks

__all__ = ["cells", "stacks"]
