"""All criteria on a ViT, on a language model and on a recurrent one."""

import families
import languages
import pytest
import torch
import truth
from families import CLASSES, shaken
from nets import Own
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisherprune as fp

pytestmark = pytest.mark.usefixtures("one_thread")

OF_ANY_LOSS = [
    "random",
    "magnitude",
    "grad_norm",
    "snip",
    "grasp",
    "grasp_reversed",
    "fisher_diag",
    "fisher_pruner",
    "fts",
    "fts_deletion",
    "fbss",
    "hutchinson_diag",
    "hutchinson_pruner",
    "hutchinson_taylor",
]


def recurrent():
    model = Own(
        lambda m, x: m.head(m.layer(x)[0].mean(1)),
        layer=nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True),
        head=nn.Linear(10, CLASSES),
    )
    batches = [(torch.randn(n, 4, 6), torch.randint(CLASSES, (n,))) for n in (2, 3)]
    return shaken(model), batches


MODELS = {
    "vit": lambda: (*families.VISION["vit"](), fp.losses.classification),
    "gpt2": lambda: (languages.gpt2(), languages.of_tokens(), fp.losses.next_token),
    "lstm": lambda: (*recurrent(), fp.losses.classification),
}


@pytest.mark.parametrize("what", MODELS)
def test_scores(what):
    model, batches, losses = MODELS[what]()
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    parameters = {n: p for n, p in model.named_parameters() if n in names}
    codes = {"losses": losses, "parameters": parameters, "seed": 3}
    codes["settings"] = fp.Settings(probes=2)
    found = fp.score_all(model, batches, OF_ANY_LOSS, **codes)
    moments = truth.moments_of_losses(model, batches, names, losses, [1])[1]
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
        products = truth.hessian_gradient_of_losses(model, batches, names, losses)
        estimates = truth.hutchinson_of_losses(model, batches, names, losses, 3, 2)
    for name, weight in parameters.items():
        w, (m, fisher) = weight.detach().double(), moments[name]
        u = truth.uniform(3, name, w.shape)
        found_by = {"m": m, "F": fisher, "Hm": products[name], "D": estimates[name]}
        for code in OF_ANY_LOSS:
            wanted = truth.score(code, w, 1, u, **found_by)
            error = truth.relative_error(found[code][name], wanted)
            assert error < 1e-3, (code, name)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.filterwarnings("ignore::fisherprune.FisherpruneWarning")
def test_embeddings_with_sparse_gradients(each):
    """The same as with dense ones, where samples run alone, too."""

    def forward(m, x):
        if each:
            return torch.stack([m.head(m.table(row).tanh().mean(0)) for row in x])
        return m.head(m.table(x).tanh().mean(1))

    model = Own(
        forward, table=nn.Embedding(7, 6, sparse=True), head=nn.Linear(6, CLASSES)
    )
    batches = [(torch.randint(7, (n, 4)), torch.randint(CLASSES, (n,))) for n in (2, 3)]
    options = {"parameters": dict(model.named_parameters())}
    found = fp.score_all(model, batches, OF_ANY_LOSS, **options)
    assert model.table.sparse
    model.table.sparse = False
    expected = fp.score_all(model, batches, OF_ANY_LOSS, **options)
    for code, scores in expected.items():
        for name, wanted in scores.items():
            torch.testing.assert_close(found[code][name], wanted)


@pytest.mark.parametrize("what", ["vit", "lstm"])
def test_obd_of_the_default_loss(what):
    model, batches, _ = MODELS[what]()
    parameters = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    found = fp.score(model, batches, "obd", parameters=parameters)
    x = torch.cat([x for x, _ in batches])
    for name, diagonal in truth.gauss_newton_diagonal(model, x, parameters).items():
        wanted = parameters[name].detach().double().square() * diagonal / 2
        assert truth.relative_error(found[name], wanted) < 1e-4, name


def test_obd_of_a_models_own_loss_is_refused():
    model, batches, _ = MODELS["gpt2"]()
    match = "losses must be none .* next_token, .*, for the Gauss-.* got <function hugg"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.score(model, batches, "obd", losses=fp.losses.hugging_face)
