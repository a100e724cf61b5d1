"""prunable_parameters: the default choice and the choice by name."""

import copy
import warnings

import pytest
import torch
from nets import SequenceNet, TwiceNet, conv_net
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fisherprune as fp
from fisherprune import models
from fisherprune.errors import FisherpruneWarning
from fisherprune.parameters import classifier_name


def test_default_is_conv_and_linear_weights_without_the_classifier():
    assert list(fp.prunable_parameters(conv_net())) == [
        f"{i}.weight" for i in (0, 3, 5, 7, 9)
    ]
    assert list(fp.prunable_parameters(SequenceNet())) == [
        "conv.weight",
        "embed.weight",
        "mix.weight",
    ]


def test_returns_the_parameters_themselves():
    model = conv_net()
    for name, parameter in fp.prunable_parameters(model).items():
        assert parameter is model.get_parameter(name)


def test_skip_chooses_by_parts_of_names():
    model = TwiceNet()
    chosen = fp.prunable_parameters(model, skip=("bias", "head"))
    assert list(chosen) == ["conv.weight", "bn.weight", "fc.weight"]
    assert list(fp.prunable_parameters(model, skip=())) == [
        name for name, _ in model.named_parameters()
    ]
    assert fp.prunable_parameters(model, skip="bias").keys() == (
        fp.prunable_parameters(model, skip=("bias",)).keys()
    )


def test_tied_weights_are_listed_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert list(fp.prunable_parameters(model)) == ["0.weight"]


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(3, 2), nn.BatchNorm2d(3)])
def test_nothing_to_prune_is_an_error(model):
    with pytest.raises(fp.FisherpruneError, match="has no prunable parameters"):
        fp.prunable_parameters(model)
    with pytest.raises(fp.FisherpruneError, match="no prunable parameters among its"):
        fp.prunable_parameters(conv_net(), skip=[""])


def test_one_dimensional_convolutions_count():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(6, 2))
    assert list(fp.prunable_parameters(model)) == ["0.weight"]
    moments = fp.gradient_moments(
        model, [(torch.randn(4, 2, 4), torch.randint(2, (4,)))]
    )
    assert moments.fisher["0.weight"].shape == (3, 2, 3)


def test_reading_the_choice_changes_no_buffer():
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fp.FisherpruneError):
        fp.prunable_parameters(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert fp.prunable_parameters(nn.Sequential(nn.Linear(2, 2), model[0])) != {}


@pytest.mark.parametrize(
    "wrap",
    [weight_norm, spectral_norm, lambda m: prune.random_unstructured(m, "weight", 0.5)],
)
def test_computed_weights_are_not_left_out_silently(wrap):
    model = nn.Sequential(wrap(nn.Conv2d(2, 3, 1)), nn.Flatten(), nn.Linear(3, 2))
    match = (
        r"weight of '0' must be a parameter of that \w*Conv2d, got one computed from "
        r"others: choose yourself, by skip=\(...\) or parameters=\{name: parameter"
    )
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.prunable_parameters(model)
    chosen = fp.prunable_parameters(model, skip=("0.parametrizations", "0.weight"))
    x, y = torch.randn(3, 2, 1, 1), torch.tensor([0, 1, 1])
    found = fp.gradient_moments(model, [(x, y)], parameters=chosen)
    assert list(found.mean) == ["0.bias", "2.weight", "2.bias"]


def test_skip_must_be_parts_of_names():
    for skip in (3, [3], ["bias", None]):
        with pytest.raises(fp.FisherpruneError, match="skip must be parts of .*, got "):
            fp.prunable_parameters(conv_net(), skip)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_any_dimensions_are_prunable_and_transposed_ones(dims):
    conv, transposed = (getattr(nn, f"{k}{dims}d") for k in ("Conv", "ConvTranspose"))
    net = nn.Sequential(conv(1, 2, 3), transposed(2, 1, 2), nn.Flatten())
    model = nn.Sequential(net, nn.Linear(4**dims, 5))
    assert list(fp.prunable_parameters(model)) == ["0.0.weight", "0.1.weight"]
    x, y = torch.randn(4, 1, *[5] * dims), torch.randint(5, (4,))
    masks = fp.prune(model, [(x, y)], "fts", 0.5)
    assert masks.kept() == (2 * 3**dims + 2 * 2**dims) // 2


def test_a_part_that_no_name_contains():
    model = TwiceNet()
    message = r"no parameter's name contains 'biass' \(did you mean 'bias'\?\)"
    for skip in (("biass",), "biass", ("biass", "linear")):
        with pytest.raises(
            fp.FisherpruneError, match=f"{message}.*; skip=.. chooses all"
        ):
            fp.prunable_parameters(model, skip)
    with pytest.warns(FisherpruneWarning, match=f"{message}: it skips nothing"):
        chosen = fp.prunable_parameters(model, ("biass", "bn", "head"))
    assert list(chosen) == ["conv.weight", "conv.bias", "fc.weight", "fc.bias"]


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet50", "vgg11", "vgg19"])
def test_choices_among_our_models_are_silent(name):
    model = models.create(name, 10, 3, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.prunable_parameters(model)
        fp.prunable_parameters(model, ("bias", "linear", "bn"))


def test_the_published_choice_among_models_with_other_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.warns(FisherpruneWarning, match="contains 'linear', 'bn': it skips"):
        chosen = fp.prunable_parameters(model, ("bias", "linear", "bn"))
    assert list(chosen) == ["0.weight", "1.weight"]


def test_frozen_parameters_are_left_out():
    model = conv_net()
    model[3].weight.requires_grad_(False)
    assert "3.weight" not in fp.prunable_parameters(model)
    assert "3.weight" not in fp.prunable_parameters(model, "bias")
    assert len(fp.prune(model, [], "magnitude", 0.5)) == 4
    for parameter in model[:12].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(fp.FisherpruneError, match="no prunable .*; 5 are frozen: unfr"):
        fp.prunable_parameters(model)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.up = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 16))
        self.words, self.head = nn.Embedding(500, 8), nn.Linear(8, 500)


def test_weights_that_are_not_chosen_are_named_where_they_are_most():
    with pytest.warns(
        FisherpruneWarning,
        match=r"6% of the weights are chosen, .*: 'up' .Experts.: ch",
    ):
        assert list(fp.prunable_parameters(Experts())) == ["router.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.prunable_parameters(Experts(), ("bias", "head", "words"))
        encoder = nn.TransformerEncoderLayer(8, 2, 32)
        fp.prunable_parameters(nn.Sequential(nn.Embedding(500, 8), encoder))


def test_parameters_that_are_no_dict():
    model = conv_net()
    for wrong in (model.parameters(), list(model.parameters()), "0.weight", model):
        for use in (fp.score, fp.prune):
            with pytest.raises(
                fp.FisherpruneError, match="^parameters must be a dict .{1,99}$"
            ):
                use(model, [], "magnitude", parameters=wrong)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 5)


def test_modules_are_chosen_by_their_class():
    model = Recurrent()
    lstm = ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    for kinds, names in {
        (nn.Linear,): ["mix.weight"],
        (nn.LSTM,): lstm,
        (nn.Linear, nn.LSTM): [*lstm, "mix.weight"],
        (nn.LSTM, nn.Embedding): ["words.weight", *lstm],
    }.items():
        chosen = fp.prunable_parameters(model, modules=kinds)
        assert list(chosen) == names
        assert all(p is model.get_parameter(name) for name, p in chosen.items())
    assert list(fp.prunable_parameters(model, modules=nn.RNNBase)) == lstm


def test_skip_leaves_some_of_the_chosen_modules_out_and_the_classifier_in():
    model, kinds = Recurrent(), (nn.Linear, nn.LSTM)
    lstm = ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    for skip, names in {
        (): [*lstm, "mix.weight", "head.weight"],
        ("head",): [*lstm, "mix.weight"],
        ("lstm", "bias"): ["mix.weight", "head.weight"],
        ("hh", "mix"): [lstm[0], "head.weight"],
    }.items():
        chosen = fp.prunable_parameters(model, skip, modules=kinds)
        assert list(chosen) == names


def test_a_lone_layer_is_the_classifier():
    with pytest.raises(fp.FisherpruneError, match="takes the classifier, too$"):
        fp.prunable_parameters(nn.Sequential(nn.Linear(3, 2)))


def test_modules_within_a_module_are_not_its_own():
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 2))
    chosen = fp.prunable_parameters(model, modules=(nn.MultiheadAttention,))
    assert list(chosen) == ["0.self_attn.in_proj_weight"]
    both = fp.prunable_parameters(model, modules=(nn.MultiheadAttention, nn.LayerNorm))
    assert list(both) == [*chosen, "0.norm1.weight", "0.norm2.weight"]
    match = r"no prunable parameters among its 14 \(skip=None, modules=.*EncoderLayer"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.prunable_parameters(model, modules=nn.TransformerEncoderLayer)


def test_modules_without_weights_are_passed_over_but_computed_weights_are_not():
    model = nn.Sequential(
        nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.PReLU(), nn.Linear(4, 2)
    )
    kinds = (nn.BatchNorm1d, nn.PReLU)
    assert list(fp.prunable_parameters(model, modules=kinds)) == [
        "0.weight",
        "2.weight",
    ]
    weight_norm(model[0])
    match = "weight of '0' must be a parameter of that ParametrizedBatchNorm1d, got one"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.prunable_parameters(model, modules=kinds)
    rest = fp.prunable_parameters(model, skip="0.", modules=kinds)
    assert list(rest) == ["2.weight"]


def test_modules_must_be_classes_that_the_model_has():
    model = Recurrent()
    for wrong in (3, "Linear", (), (nn.Linear, 3), (nn.Linear(2, 2),), (Tensor,)):
        match = "^prunable_parameters: modules must be classes of modules, .*, got "
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.prunable_parameters(model, modules=wrong)
    match = "no module of the model is one of GRU, Conv2d$"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.prunable_parameters(model, modules=(nn.GRU, nn.Conv2d))
    with pytest.warns(FisherpruneWarning, match="no module .* is one of GRU$"):
        chosen = fp.prunable_parameters(model, modules=(nn.GRU, nn.Linear))
    assert list(chosen) == ["mix.weight"]


def test_a_choice_by_class_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.prunable_parameters(Experts(), modules=(nn.Linear,))


def test_the_classifier_is_the_last_linear_and_its_name_is_told():
    model = conv_net()
    assert "12.weight" not in fp.prunable_parameters(model)
    for each in (model, nn.DataParallel(model), torch.compile(model)):
        assert classifier_name(each) == "12"
    assert classifier_name(model[:9]) is None
    with pytest.raises(fp.FisherpruneError, match="model must be a torch.nn.Module"):
        classifier_name(None)


class HeadFirst(nn.Module):
    """A language model whose head comes before its block."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


def test_a_head_that_is_tied_to_an_embedding_is_the_classifier():
    model = HeadFirst()
    assert list(fp.prunable_parameters(model)) == ["head.weight", "up.weight"]
    model.head.weight = model.words.weight
    chosen = fp.prunable_parameters(model)
    assert list(chosen) == ["up.weight", "down.weight"]
    assert classifier_name(model) == "head"


def test_a_model_may_say_which_module_is_its_head():
    class Told(HeadFirst):
        def get_output_embeddings(self):
            return self.told

    model = Told()
    for told, names in (
        (model.head, ["up.weight", "down.weight"]),
        (nn.ModuleList([model.head, model.up]), ["down.weight"]),
        (None, ["head.weight", "up.weight"]),
    ):
        model.told = told
        for wrapped in (model, nn.DataParallel(model)):
            assert list(fp.prunable_parameters(wrapped)) == names


def test_models_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_embd=8, n_head=2, n_layer=1, vocab_size=11, n_positions=6)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    chosen = fp.prunable_parameters(model)
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(chosen) == [f"transformer.h.0.{name}.weight" for name in names]
    assert classifier_name(model) == "lm_head"
    sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    config = transformers.BertConfig(**sizes, intermediate_size=8, vocab_size=11)
    for kind, classifier in {
        "BertForPreTraining": "cls.predictions.decoder",
        "BertForSequenceClassification": "classifier",
    }.items():
        model = getattr(transformers, kind)(config)
        chosen = fp.prunable_parameters(model)
        assert classifier_name(model) == classifier
        assert len([name for name in chosen if "encoder.layer.0" in name]) == 6
        assert not any("embeddings" in name for name in chosen)
