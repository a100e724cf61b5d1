"""Losses of transformers' models against the models' own, one sample at a time."""

from types import SimpleNamespace

import pytest
import torch
from checks import assert_losses
from torch import nn

import fisherprune as fp
from fisherprune.losses import hugging_face, next_token

hf = pytest.importorskip("transformers")

SAMPLES, LENGTH, VOCABULARY, LABELS = 5, 6, 19, 3
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_labels": LABELS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(kind, **options):
    """Return a small model by the names of its class and of its configuration.

    Its weights are large, so that its losses are far apart.
    """
    name, config = kind
    model = getattr(hf, name)(getattr(hf, config)(**SMALL | options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def tokens(most=VOCABULARY, ignored=False):
    """Draw numbers of tokens or labels; of those, some positions don't count."""
    drawn = torch.randint(most, (SAMPLES, LENGTH))
    if ignored:  # the last labels count for each kind of model
        drawn[:, :-1][torch.rand(SAMPLES, LENGTH - 1) < 0.4] = -100
    return drawn


def own(model, one):
    return model(**one).loss.double()  # some models compute it in float32


BERT, LLAMA, GPT2 = "BertConfig", "LlamaConfig", "GPT2Config"


@pytest.mark.parametrize(
    "kind",
    [
        ("LlamaForCausalLM", LLAMA),
        ("GPT2LMHeadModel", GPT2),
        ("BertLMHeadModel", BERT),
        ("BertForMaskedLM", BERT),
        ("DistilBertForMaskedLM", "DistilBertConfig"),
    ],
)
def test_language_models(kind):
    model = made(kind)
    batch = {"input_ids": tokens(), "labels": tokens(ignored=True)}
    assert_losses(hugging_face, model, batch, own)


T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
BART = {
    name: 1 if name.endswith("layers") else 2 if name.endswith("heads") else 12
    for side in ("encoder", "decoder")
    for name in (f"{side}_layers", f"{side}_attention_heads", f"{side}_ffn_dim")
}


@pytest.mark.parametrize(
    "kind, options",
    [
        (("T5ForConditionalGeneration", "T5Config"), T5),
        (("BartForConditionalGeneration", "BartConfig"), BART | {"d_model": 8}),
    ],
)
def test_decoders_that_read_the_labels(kind, options):
    model = made(kind, decoder_start_token_id=0, **options)
    batch = {"input_ids": tokens(), "labels": tokens(ignored=True)}
    assert_losses(hugging_face, model, batch, own)


@pytest.mark.parametrize(
    "kind",
    [
        ("BertForNextSentencePrediction", BERT),
        ("BertForMultipleChoice", BERT),
    ],
)
def test_one_of_several(kind):
    ids = torch.randint(1, VOCABULARY, (SAMPLES, 3, LENGTH))
    if kind[0] == "BertForNextSentencePrediction":
        ids = ids[:, 0]
    batch = {"input_ids": ids, "labels": torch.randint(2, (SAMPLES,))}
    assert_losses(hugging_face, made(kind), batch, own)


@pytest.mark.parametrize(
    "kind",
    [
        ("BertForTokenClassification", BERT),
        ("LlamaForTokenClassification", LLAMA),
        ("GPT2ForTokenClassification", GPT2),
    ],
)
def test_labels_of_tokens(kind):
    batch = {"input_ids": tokens(), "labels": tokens(LABELS, ignored=True)}
    assert_losses(hugging_face, made(kind), batch, own)


@pytest.mark.parametrize("problem", ["one", "several", "regression", "regressions"])
@pytest.mark.parametrize(
    "kind",
    [
        ("BertForSequenceClassification", BERT),
        ("LlamaForSequenceClassification", LLAMA),
        ("GPT2ForSequenceClassification", GPT2),
    ],
)
def test_labels_of_sequences(kind, problem):
    numbers = torch.randn(SAMPLES, LABELS)
    labels, options = {
        "one": (torch.randint(LABELS, (SAMPLES,)), {}),
        "several": ((numbers > 0).float(), {}),
        "regression": (numbers[:, 0], {"num_labels": 1}),
        "regressions": (numbers, {"problem_type": "regression"}),
    }[problem]
    model = made(kind, **options)
    batch = hf.BatchEncoding({"input_ids": tokens(), "labels": labels})
    before = model.config.problem_type
    hugging_face(model, batch)
    assert model.config.problem_type == before
    assert_losses(hugging_face, model, batch, own)


def test_labels_of_images():
    options = {"image_size": 8, "patch_size": 4}
    model = made(("ViTForImageClassification", "ViTConfig"), **options)
    pixels, labels = torch.randn(SAMPLES, 3, 8, 8), torch.randint(LABELS, (SAMPLES,))
    batch = {"pixel_values": pixels, "labels": labels}
    assert_losses(hugging_face, model, batch, own)


@pytest.mark.parametrize(
    "kind",
    [
        ("BertForQuestionAnswering", BERT),
        ("LlamaForQuestionAnswering", LLAMA),
        ("GPT2ForQuestionAnswering", GPT2),
    ],
)
def test_answers(kind):
    model, ends = made(kind, num_labels=2), tokens(LENGTH)
    batch = {"input_ids": tokens()}
    batch |= {"start_positions": ends[:, 0], "end_positions": ends[:, 1]}
    assert_losses(hugging_face, model, batch, own)
    outside = batch["end_positions"].clone()
    for name in ("start_positions", "end_positions"):
        batch[name][2] = LENGTH
    losses = hugging_face(model, batch)
    assert losses[2] == 0 and (losses[[0, 1, 3, 4]] > 0).all()
    # One end alone: the model's loss of this sample is a mean over nothing.
    batch["end_positions"] = outside
    assert hugging_face(model, batch).isnan().tolist() == [i == 2 for i in range(5)]


@pytest.mark.parametrize("all_of_them", [False, True])
def test_samples_of_which_nothing_counts(all_of_them):
    model = made(("LlamaForCausalLM", LLAMA))
    batch = {"input_ids": tokens(), "labels": tokens()}
    batch["labels"][slice(None) if all_of_them else slice(1, 3)] = -100
    losses = hugging_face(model, batch)
    none = [True] * SAMPLES if all_of_them else [False, True, True, False, False]
    assert (losses == 0).tolist() == none
    grads = torch.autograd.grad(
        losses[1], [*model.parameters()], materialize_grads=True
    )
    assert all((grad == 0).all() for grad in grads)


def test_a_loss_that_is_no_number_stays_none():
    model = made(("LlamaForCausalLM", LLAMA))
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    losses = hugging_face(model, {"input_ids": tokens(), "labels": tokens()})
    assert losses.isnan().all()
    labels = torch.full((SAMPLES, LENGTH), -100)
    losses = hugging_face(model, {"input_ids": tokens(), "labels": labels})
    assert losses.isnan().all()


def test_the_loss_of_a_language_model_is_next_token():
    model = made(("LlamaForCausalLM", LLAMA))
    batch = {"input_ids": tokens(), "labels": tokens(ignored=True)}
    torch.testing.assert_close(hugging_face(model, batch), next_token(model, batch))


def test_adapters():
    peft = pytest.importorskip("peft")
    model = made(("LlamaForCausalLM", LLAMA))
    adapter = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    batch = {"input_ids": tokens(), "labels": tokens(ignored=True)}
    expected = hugging_face(model, batch)
    wrapped = peft.get_peft_model(model, adapter)
    torch.testing.assert_close(hugging_face(wrapped, batch), expected)


def test_a_loss_function_that_the_user_has_set():
    model = made(("BertLMHeadModel", BERT))

    def squared(logits, labels, **_):
        return (logits.mean(-1) - labels).square().mean()

    model.loss_function = squared
    batch = {"input_ids": tokens(), "labels": tokens()}
    assert_losses(hugging_face, model, batch, own)


def test_models_that_add_to_their_loss_are_refused():
    options = {"num_local_experts": 4, "num_experts_per_tok": 2}
    kind = ("MixtralForCausalLM", "MixtralConfig")
    options |= {"num_key_value_heads": 2}
    model = made(kind, output_router_logits=True, router_aux_loss_coef=1.0, **options)
    batch = {"input_ids": tokens(), "labels": tokens()}
    match = r"loss of a batch, [\d.]+, must be that of its loss_function .* got [\d.]+:"
    with pytest.raises(fp.FisherpruneError, match=match):
        hugging_face(model, batch)
    without = made(kind, output_router_logits=False, **options)
    assert hugging_face(without, batch).shape == (SAMPLES,)


def test_models_of_another_loss_are_refused():
    model = made(("BertForMaskedLM", BERT))
    forward = model.forward

    def halved(**batch):
        outputs = forward(**batch)
        outputs.loss = outputs.loss / 2
        return outputs

    model.forward = halved
    batch = {"input_ids": tokens(), "labels": tokens()}
    match = r"must be that of its loss_function .*write a function losses\(model, batc"
    with pytest.raises(fp.FisherpruneError, match=match):
        hugging_face(model, batch)


def test_models_without_a_loss_function_are_told_what_to_do():
    match = "must have a loss_function, .* got Linear: write a function losses"
    with pytest.raises(fp.FisherpruneError, match=match):
        hugging_face(nn.Linear(3, 4), {"labels": torch.zeros(3)})


def test_outputs_without_a_loss():
    model = made(("BertForMaskedLM", BERT))
    model.forward = lambda **_: SimpleNamespace(logits=torch.zeros(SAMPLES, 3))
    batch = {"input_ids": tokens(), "labels": tokens()}
    with pytest.raises(fp.FisherpruneError, match="as loss and logits, got SimpleName"):
        hugging_face(model, batch)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(2, 3), torch.zeros(2)),
        {"input_ids": torch.zeros(2, 3)},
        {"input_ids": torch.zeros(2, 3), "labels": [1, 2]},
        {"start_positions": torch.zeros(2)},
    ],
)
def test_batches_without_labels_are_refused(batch):
    model = made(("BertForMaskedLM", BERT))
    match = "a batch must be a dictionary with labels, or start_positions and end_posi"
    with pytest.raises(fp.FisherpruneError, match=match):
        hugging_face(model, batch)
