"""``fisherprune fisher``: the gradient moments of a trained model, kept in a file."""
