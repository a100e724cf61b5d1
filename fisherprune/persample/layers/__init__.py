"""What each kind of layer contributes to per-sample gradients."""
