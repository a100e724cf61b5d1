"""How a backward pass hands over per-sample gradients.

``register_layer`` adds a kind of layer, which contributes ``Factors`` or ``Rows``.
"""

from fisherprune.persample.contributions import Contribution, Factors, Rows
from fisherprune.persample.layers.base import Layer, LayerCall, register_layer

__all__ = ["Contribution", "Factors", "Layer", "LayerCall", "Rows", "register_layer"]
