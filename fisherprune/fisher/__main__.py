"""``fisherprune fisher``: write the gradient moments of a model."""

from __future__ import annotations

import hashlib
import sys
from argparse import Namespace
from collections.abc import Sequence

from fisherprune.commandline import prepare, run_command

if __name__ == "__main__":
    prepare()

from torch import nn

from fisherprune import models
from fisherprune.errors import FieldError
from fisherprune.files import check_writable
from fisherprune.fisher.options import parse, places
from fisherprune.fisher.samples import Samples, load_samples
from fisherprune.fisher.table import table
from fisherprune.fisher.tensors import load_weights
from fisherprune.parameters import plain_parameters, prunable_parameters
from fisherprune.runs.device import resolve_device
from fisherprune.runs.environment import environment
from fisherprune.statistics.key import hash_of
from fisherprune.statistics.moments import gradient_moments
from fisherprune.streams import stream_seed


def main(argv: Sequence[str] | None = None) -> int:
    """Write the moments and print the table; return the exit code."""
    arguments = None if argv is None else list(argv)
    return run_command("fisherprune.fisher", lambda: _command(parse(arguments)))


def _command(options: Namespace) -> int:
    device = resolve_device(options.device)
    check_writable(options.output.parent, "the folder of output")
    samples = load_samples(options)
    model = _model(options, samples)
    about = {
        "model": options.model,
        "model_source": models.source_hash(options.model),
        "weights": _weights(options, model),
        "data": samples.about,
        "loss": "cross-entropy",
        "seed": options.seed,
        "draws": options.draws,
        "parameters": "all" if options.all_parameters else "prunable",
        "environment": environment(device),
    }
    chosen = plain_parameters if options.all_parameters else prunable_parameters
    model.to(device)
    found = gradient_moments(
        model,
        samples.batches,
        group_size=options.group_size,
        labels=options.labels,
        draws=options.draws,
        seed=options.seed,
        parameters=dict(chosen(model)),
        progress=sys.stderr.isatty(),
        **places(options),
    )
    found.save(options.output, provenance=about)
    print(table(found))
    of = f"{found.samples} samples in {found.groups} groups of {found.group_size}"
    print(f"{options.output}: {of}, {found.labels} labels")
    return 0


def _model(options: Namespace, samples: Samples) -> nn.Module:
    """Return the model with its weights."""
    channels, size, _ = samples.shape
    classes = options.classes or max(samples.classes, 2)
    if classes < samples.classes:
        wanted = f"at least {samples.classes}, as many as the data have"
        raise FieldError("classes", wanted, classes)
    seed = stream_seed(options.seed, "initialization")
    model = models.create(options.model, classes, channels, image_size=size, seed=seed)
    if options.weights is not None:
        load_weights(model, options.weights)
    return model


def _weights(options: Namespace, model: nn.Module) -> dict[str, object]:
    """Return what identifies the weights: their file's hash, and one of their own."""
    named = [value for item in model.state_dict().items() for value in item]
    about: dict[str, object] = {"fingerprint": hash_of(*named)[:32]}
    if options.weights is not None:
        digest = hashlib.sha256(options.weights.read_bytes()).hexdigest()
        about |= {"file": options.weights.name, "sha256": digest}
    return about


if __name__ == "__main__":
    sys.exit(main())
