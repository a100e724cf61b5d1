"""Small models of transformers, and sequences of several lengths for them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families import CLASSES, TOKENS, shaken

import fisherprune as fp

LENGTHS = (7, 5, 2), (4, 9)
"""Of the sequences of each batch."""


def padded(lengths, sides=("right", "left")):
    """Return tokens and the mask of sequences, padded at either side in turn."""
    tokens = torch.randint(1, TOKENS, (len(lengths), max(lengths)))
    mask = torch.zeros_like(tokens)
    for i, length in enumerate(lengths):
        if sides[i % len(sides)] == "right":
            mask[i, :length] = 1
        else:
            mask[i, max(lengths) - length :] = 1
    return {"input_ids": tokens * mask, "attention_mask": mask}


def of_tokens():
    return [padded(lengths, ["right"]) for lengths in LENGTHS]


def labelled():
    """Return sequences, each of one class."""
    return [
        {**each, "labels": torch.randint(CLASSES, (len(each["input_ids"]),))}
        for each in of_tokens()
    ]


def answered():
    """Return sequences, and other ones that follow them, padded with -100."""
    found = []
    for each in of_tokens():
        labels = torch.randint(1, TOKENS, (len(each["input_ids"]), 4))
        labels[1:, 2:] = -100
        found.append({**each, "labels": labels})
    return found


def pictures():
    return [
        {"pixel_values": torch.randn(n, 3, 16, 16), "labels": torch.arange(n) % CLASSES}
        for n in (2, 3)
    ]


def made(model, config, **options):
    """Return a model of transformers."""
    lib = pytest.importorskip("transformers")
    return shaken(getattr(lib, model)(getattr(lib, config)(**options)))


def gpt2():
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
    return made("GPT2LMHeadModel", "GPT2Config", vocab_size=TOKENS, **sizes)


SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "vocab_size": TOKENS}


def llama(tied):
    return made("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=tied, **GROUPED)


def mixtral():
    """Return a model with experts; grouped products of matrices are float32's alone."""
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return made("MixtralForCausalLM", "MixtralConfig", **GROUPED, **experts)


def bert(kind="SequenceClassification"):
    labels = {"num_labels": CLASSES} if kind == "SequenceClassification" else {}
    return made(f"BertFor{kind}", "BertConfig", vocab_size=TOKENS, **SIZES, **labels)


def t5():
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return made(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=TOKENS,
        decoder_start_token_id=0,
        **sizes,
    )


def vit():
    sizes = {"image_size": 16, "patch_size": 8, "num_labels": CLASSES}
    return made("ViTForImageClassification", "ViTConfig", **SIZES, **sizes)


def adapted():
    """Return GPT-2 with low-rank adapters, the base frozen."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    return shaken(peft.get_peft_model(gpt2(), config))


next_token, own = fp.losses.next_token, fp.losses.hugging_face

LANGUAGE = {
    # the model, its batches, its losses
    "gpt2": (gpt2, of_tokens, next_token),
    "llama": (partial(llama, False), of_tokens, next_token),
    "llama, tied": (partial(llama, True), of_tokens, next_token),
    "mixtral": (mixtral, of_tokens, next_token),
    "bert": (bert, labelled, fp.losses.classification),
    "bert's own loss": (bert, labelled, own),
    "bert, masked": (
        partial(bert, "MaskedLM"),
        lambda: [{**b, "labels": b["input_ids"]} for b in of_tokens()],
        own,
    ),
    "t5": (t5, answered, own),
    "vit": (vit, pictures, own),
    "adapters": (adapted, of_tokens, next_token),
}
