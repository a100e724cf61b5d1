"""Ready-made losses of single samples: ``losses=fisherprune.losses.classification``.

Each is a function ``losses(model, batch)`` that runs the model once and returns one
loss for each of the batch's N samples, ``[N]``, as no other sample changes it. Options
are given by ``functools.partial``; for anything else, write such a function.

A batch is a pair ``(inputs, labels)``, of which the model is called as
``model(inputs)``, or a dictionary with the key ``"labels"``, all of whose other items
are the model's keyword arguments. The model returns its scores as a tensor, or an
object with the attribute ``logits``.
"""

from fisherprune.losses.cross_entropy import classification, next_token, sequences
from fisherprune.losses.elementwise import binary, regression
from fisherprune.losses.own import hugging_face

__all__ = [
    "binary",
    "classification",
    "hugging_face",
    "next_token",
    "regression",
    "sequences",
]
