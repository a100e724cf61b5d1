"""How a backward pass hands over per-sample gradients.

``register_layer`` adds a kind of layer, which contributes ``Factors`` or ``Rows``.
"""

from fisherprune.persample.contributions import Contribution, Rows
from fisherprune.persample.factors import Factors
from fisherprune.persample.meeting import register_gradients
from fisherprune.persample.registry import Layer, LayerCall, register_layer

__all__ = [
    "Contribution",
    "Factors",
    "Layer",
    "LayerCall",
    "Rows",
    "register_gradients",
    "register_layer",
]
