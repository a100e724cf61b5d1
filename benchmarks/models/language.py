"""Families of transformers, and adapters of peft, tiny: made from configurations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import fisherprune as fp
from benchmarks.models.case import CLASSES, SAMPLES, Case

TOKENS, LENGTH = 61, 7
TINY: dict[str, Any] = {
    "vocab_size": TOKENS,
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("embedding_size", "embed_dim", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "rotary_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size",), 16),
    **dict.fromkeys(("shared_expert_intermediate_size",), 16),
    "num_experts_per_tok": 2,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes, by the names that configurations have for them."""

CAUSAL = (
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "gpt_bigcode", "opt", "bloom"),
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("gemma", "gemma2", "phi", "phi3", "falcon", "mpt", "olmo", "olmo2", "olmoe"),
    *("stablelm", "starcoder2", "cohere", "granite", "mamba", "falcon_mamba", "rwkv"),
    *("biogpt", "bitnet", "cohere2", "gemma3_text", "glm", "helium", "nemotron"),
    *("olmo3", "openai-gpt", "persimmon", "recurrent_gemma", "roformer", "xlstm"),
    *("granitemoe", "gpt_oss", "jamba", "lfm2", "minimax"),
)
CLASSIFIERS = (
    *("bert", "roberta", "albert", "electra", "distilbert", "deberta-v2", "mpnet"),
    *("xlnet", "funnel", "layoutlm", "longformer", "modernbert", "convbert"),
)
TRANSLATORS = ("t5", "bart", "mbart", "pegasus", "marian", "blenderbot", "m2m_100")
IMAGES = (
    *("vit", "beit", "swinv2", "convnext", "convnextv2", "resnet"),
    *("regnet", "dinov2", "segformer", "mobilevit", "mobilenet_v2", "poolformer"),
    *("pvt_v2", "vit_msn", "cvt", "focalnet", "deit", "swin", "ijepa", "hiera", "pvt"),
    *("data2vec-vision", "dinov2_with_registers", "hgnet_v2", "swiftformer"),
    *("mobilevitv2", "mobilenet_v1", "efficientnet"),
)


def transformers_models(every: bool = False) -> Iterator[Case]:
    """Yield a tiny model of each family of the sample."""
    hugging_face = fp.losses.hugging_face
    kinds = (
        (CAUSAL, "CausalLM", of_tokens, fp.losses.next_token),
        (CLASSIFIERS, "SequenceClassification", of_classes, hugging_face),
        (TRANSLATORS, "Seq2SeqLM", of_answers, hugging_face),
        (IMAGES, "ImageClassification", of_images, hugging_face),
    )
    for families, head, draw, losses in kinds:
        for family in families:
            make = partial(made, family, head, draw)
            yield Case("transformers", family, head, make, losses)


def made(family: str, head: str, draw: Any) -> tuple[nn.Module, Any]:
    """Return a tiny model and its batch."""
    import transformers

    config = tiny(transformers.CONFIG_MAPPING[family])
    own = type(config).__name__.removesuffix("Config")
    config.architectures = [f"{own}For{head}"]  # of several that fit
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    return model.float(), draw(config)


def tiny(kind: Any) -> Any:
    """Return a configuration with those of the tiny sizes that it knows."""
    known = kind().to_dict()
    sizes = {n: v for n, v in TINY.items() if fits(known.get(n, ()), v)}
    sizes |= {"num_labels": CLASSES, "use_cache": False}
    return kind(**{**sizes, **OWN.get(kind.model_type, {})})


def fits(default: Any, size: int) -> bool:
    """Return whether a configuration takes a number: not one for each stage."""
    return default is None or (isinstance(default, int) and default is not False)


OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "swinv2": {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]},
    "t5": {"decoder_start_token_id": 0},
    "swin": {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "efficientnet": {"image_size": 64, "width_coefficient": 0.5, "hidden_dim": 640},
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
}
"""Sizes of one configuration alone."""


def tokens() -> torch.Tensor:
    """Return sequences of tokens that are no special ones."""
    return torch.randint(3, TOKENS, (SAMPLES, LENGTH))


def of_tokens(config: Any) -> Any:
    """Return sequences, the second one shorter."""
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def of_classes(config: Any) -> Any:
    """Return sequences with their classes."""
    return {**of_tokens(config), "labels": torch.randint(CLASSES, (SAMPLES,))}


def of_answers(config: Any) -> Any:
    """Return sequences, and others that follow them."""
    return {**of_tokens(config), "labels": tokens()[:, :4]}


def of_images(config: Any) -> Any:
    """Return images with their classes."""
    # On smaller ones regnet lets rounding grow: its norms see few positions.
    size = getattr(config, "image_size", 64 if config.model_type == "regnet" else 32)
    size = size if isinstance(size, int) else size[0]
    images = torch.randn(SAMPLES, 3, size, size)
    return {"pixel_values": images, "labels": torch.randint(CLASSES, (SAMPLES,))}


def peft_models(every: bool = False) -> Iterator[Case]:
    """Yield a tiny Llama with each kind of adapter."""
    import peft

    parts: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    short: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    kinds: dict[str, Any] = {
        "LoRA": peft.LoraConfig(r=3, **parts),
        "DoRA": peft.LoraConfig(r=3, use_dora=True, **parts),
        "AdaLoRA": peft.AdaLoraConfig(init_r=3, total_step=10, **parts),
        "IA3": peft.IA3Config(feedforward_modules=[], **parts),
        "LoHa": peft.LoHaConfig(r=3, **parts),
        "LoKr": peft.LoKrConfig(r=3, **parts),
        "OFT": peft.OFTConfig(oft_block_size=8, **parts),
        "VeRA": peft.VeraConfig(r=3, **parts),
        "prompt tuning": peft.PromptTuningConfig(**short),
        "prefix tuning": peft.PrefixTuningConfig(**short),
    }
    for name, config in kinds.items():
        losses = after_prompt if name == "prompt tuning" else fp.losses.next_token
        yield Case("peft", name, name, partial(adapted, config), losses)


def adapted(config: Any) -> tuple[nn.Module, Any]:
    """Return the model with an adapter, its own weights frozen."""
    import peft

    model, batch = made("llama", "CausalLM", of_tokens)
    return peft.get_peft_model(model, config), batch


def after_prompt(model: Any, batch: Any) -> torch.Tensor:
    """Return the losses of next tokens where learned ones stand before the batch's."""
    count = batch["input_ids"].shape[1]
    scores = model(**batch).logits[:, -count:]
    answer: Any = lambda **_: SimpleNamespace(logits=scores)  # noqa: E731
    return fp.losses.next_token(answer, batch)
