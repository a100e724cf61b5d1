"""What masks leave of a network: its FLOPs, and the weights that lie on paths."""

from fisherprune.subnetwork.flops import Flops, flops
from fisherprune.subnetwork.paths import effective_masks

__all__ = ["Flops", "effective_masks", "flops"]
