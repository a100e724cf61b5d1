"""A model's own loss, of each sample alone: of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.statistics.batches import reason
from fisherprune.statistics.structure import described

LOGITS = ("logits", "start_logits", "end_logits")

OTHERWISE = (
    "write a function losses(model, batch) -> Tensor [N], or take another one of "
    "fisherprune.losses"
)

Rows = dict[str, Any]
"""Logits and labels of some samples, by the names that loss functions give them."""

LossOf = Callable[[Rows], Tensor]


def hugging_face(model: nn.Module, batch: Any) -> Tensor:
    r"""Return the loss that a model of Hugging Face has of each sample alone.

    .. math:: \ell_n = \mathrm{loss\_function}(\mathrm{logits}_n, \mathrm{labels}_n)

    with the model's own ``loss_function``, of models ``ForCausalLM``, ``ForMaskedLM``,
    ``ForConditionalGeneration``, ``ForSequenceClassification``,
    ``ForTokenClassification``, ``ForImageClassification``, ``ForMultipleChoice``,
    ``ForQuestionAnswering``, and of others that call it as these do. The model runs
    once, with the labels, from which some make their decoder's inputs. What it says of
    the whole batch is compared with ``loss_function`` of the whole batch: so a model
    that computes another loss, or adds something to it, is refused.

    Args:
        model: has a ``loss_function`` and a ``config``; returns ``loss`` and ``logits``
            (``start_logits`` and ``end_logits``).
        batch: a dictionary of the model's keyword arguments, a tokenizer's
            BatchEncoding too, with ``labels`` (``start_positions`` and
            ``end_positions``).

    Returns:
        ``[N]``, the mean over a sample's own counted positions for all heads with
        positions. It is 0 for a sample of which no position counts: with all of its
        labels -100, or both its answer's ends outside of its tokens.

    Raises:
        FisherpruneError: where the batch is no such dictionary, or the model's loss is
            not that of its ``loss_function``.

    Example:
        >>> import torch, fisherprune
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2))
        >>> tokens = torch.randint(50, (4, 7))
        >>> batch = {"input_ids": tokens, "labels": tokens}
        >>> fisherprune.losses.hugging_face(model, batch).shape
        torch.Size([4])
    """
    if not callable(getattr(model, "loss_function", None)):
        kind = type(model).__name__
        raise FisherpruneError(
            "hugging_face: the model must have a loss_function, as those of "
            f"transformers, got {kind}: {OTHERWISE}"
        )
    targets = _targets(batch)
    config = getattr(model, "config", None)
    with _kept_problem_type(config):
        outputs = model(**batch)
        logits, loss = _logits_and_loss(outputs)
        del outputs  # and with it the graph of the whole batch's loss
        rows = logits | targets
        loss_of = _matching(_loss_functions(model, config), rows, loss)
        columns = zip(*(tensor.split(1) for tensor in rows.values()), strict=True)
        losses = [loss_of(dict(zip(rows, each, strict=True))) for each in columns]
    return torch.stack(_counted(losses, logits, targets))


def _targets(batch: Any) -> dict[str, Tensor]:
    """Return the labels, which loss functions call as the batch does."""
    for names in (("labels",), ("start_positions", "end_positions")):
        if isinstance(batch, Mapping):
            found = {name: batch.get(name) for name in names}
            if all(isinstance(t, Tensor) and t.dim() for t in found.values()):
                return {name: batch[name] for name in names}
    raise FisherpruneError(
        "hugging_face: a batch must be a dictionary with labels, or start_positions "
        f"and end_positions, tensors with the samples first, got {described(batch)}"
    )


def _logits_and_loss(outputs: Any) -> tuple[dict[str, Tensor], Tensor]:
    found = {name: getattr(outputs, name, None) for name in LOGITS}
    logits = {name: t for name, t in found.items() if isinstance(t, Tensor)}
    loss = getattr(outputs, "loss", None)
    if not logits or not isinstance(loss, Tensor):
        raise FisherpruneError(
            "hugging_face: the model must return tensors as loss and logits, got "
            f"{described(outputs)}: {OTHERWISE}"
        )
    with torch._C.DisableTorchFunction():  # no detach of the model's
        return logits, loss.detach()


def _loss_functions(model: nn.Module, config: object) -> Iterator[LossOf]:
    """Yield the ways in which models call their loss function."""

    def usual(rows: Rows) -> Tensor:
        if "logits" in rows:
            scores = rows["logits"]
            facts = {"config": config, "vocab_size": scores.shape[-1]}
            rows = rows | {"pooled_logits": scores} | facts
        return model.loss_function(**rows)  # type: ignore[operator]

    def unshifted(rows: Rows) -> Tensor:
        """Take the labels as they are: a decoder read them shifted, of T5 say."""
        return usual(rows | {"shift_labels": rows["labels"]})

    yield from (usual, unshifted)


def _matching(loss_functions: Iterator[LossOf], rows: Rows, loss: Tensor) -> LossOf:
    """Return the one whose loss of the whole batch is the model's."""
    coarse = any(t.dtype in (torch.float16, torch.bfloat16) for t in rows.values())
    found, got = [], ""
    for loss_of in loss_functions:
        try:
            with torch.no_grad():
                whole = loss_of(rows).to(loss)
        except Exception as error:
            got = got or reason(error)
            continue
        got = got or f"{whole.item():g}"
        if torch.isclose(whole, loss, 2e-2 if coarse else 1e-4, equal_nan=True):
            found.append((abs(whole.item() - loss.item()), loss_of))
    if not found:
        raise FisherpruneError(
            f"hugging_face: the model's loss of a batch, {loss.item():g}, must be that "
            f"of its loss_function of the logits and labels, got {got}: {OTHERWISE}"
        )
    return min(found, key=lambda pair: pair[0])[1]


def _counted(losses: list[Tensor], logits: Rows, targets: Rows) -> list[Tensor]:
    """Put 0 in place of means over no position."""
    undefined = torch.stack(losses).isnan().nonzero().flatten()
    for n in undefined.tolist():
        if _are_ignored(n, logits, targets):
            # Of the graph, and NaN where a logit is not finite.
            losses[n] = sum(0 * tensor[n].sum() for tensor in logits.values())
    return losses


def _are_ignored(n: int, logits: Rows, targets: Rows) -> bool:
    """Return whether nothing but ignored labels can have made the loss NaN."""
    if "labels" in targets:
        return not targets["labels"].is_floating_point()
    length = logits["start_logits"].shape[1]
    return all(bool((t[n] >= length).all()) for t in targets.values())


@contextmanager
def _kept_problem_type(config: object) -> Iterator[None]:
    """Put back what classifiers find out at their first loss."""
    before = getattr(config, "problem_type", None)
    try:
        yield
    finally:
        if getattr(config, "problem_type", None) != before:
            config.problem_type = before  # type: ignore[attr-defined]
