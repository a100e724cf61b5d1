"""CIFAR variants of the networks of the pruning literature."""
