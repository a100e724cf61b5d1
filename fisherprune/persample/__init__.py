"""How a backward pass hands over per-sample gradients."""
