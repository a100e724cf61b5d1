"""score and prune as a whole."""

import pytest
import torch
from nets import batches, conv_net

import fisherprune as fp
from fisherprune.errors import LayerCollapseWarning


def data(samples=13):
    return torch.randn(samples, 3, 9, 9), torch.randint(5, (samples,))


def test_prune_scores_selects_and_applies():
    model, (x, y) = conv_net(), data()
    scores = fp.score(model, [(x, y)], "fts")
    masks = fp.prune(model, [(x, y)], "fts", 0.8, ties="position")
    wanted = fp.select_masks(scores, 0.8, ties="position")
    for name, mask in wanted.items():
        assert torch.equal(masks[name], mask)
        assert not model.get_parameter(name)[~mask].any()


def test_names_that_masks_would_not_find_are_refused_before_the_pass():
    model = conv_net()
    parameters = {"mine": model[0].weight}
    with pytest.raises(fp.FisherpruneError, match="'mine' must be a name of the model"):
        fp.prune(model, None, parameters=parameters)
    assert fp.score(model, [data()], parameters=parameters).keys() == {"mine"}


def test_parameters_under_names_of_others_are_refused():
    model = conv_net()
    parameters = {"0.weight": model[3].weight, "3.weight": model[0].weight}
    with pytest.raises(fp.FisherpruneError, match="'0.weight' must be a name of the"):
        fp.prune(model, [], "magnitude", parameters=parameters)


def test_scores_that_decide_nothing_leave_the_model_as_it_was():
    model, batch = conv_net(), data()
    with torch.no_grad():
        model[12].weight.zero_()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(
        fp.FisherpruneError, match="scores must decide .* in '9.weight'"
    ):
        fp.prune(model, [batch], "fts", 0.8)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert fp.prune(model, [batch], "fts", 0.8, ties="position").sparsity() > 0.79


def test_layers_that_are_pruned_away_are_named():
    model = conv_net()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    with pytest.warns(LayerCollapseWarning, match="no weight of 1 of 5 .*'3.weight'"):
        fp.prune(model, [], "magnitude", 0.5)


def test_prune_by_layer():
    model = conv_net()
    masks = fp.prune(model, [data()], "snip", 0.5, scope="layer", ties="position")
    assert all(abs(d - 0.5) < 0.01 for d in masks.density().values())


def test_obd_reads_data_once_and_no_label():
    model, (x, y) = conv_net(), data()
    found = fp.score(model, iter([(x, torch.full_like(y, 99))]), "obd")
    assert found.keys() == fp.prunable_parameters(model).keys()


@pytest.mark.parametrize("code", ["grasp", "grasp_reversed", "obd"])
def test_data_that_can_be_read_only_once(code):
    model, (x, y) = conv_net(), data()
    once = fp.score(model, iter(batches(x, y, 5)), code)
    again = fp.score(model, batches(x, y, 5), code)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_score_all_equals_single_scores():
    model, (x, y) = conv_net(), data()
    codes = [code for code in fp.criteria() if code != "none"]
    together = fp.score_all(model, [(x, y)], codes, group_size=2, seed=5)
    assert list(together) == codes
    for code in codes:
        alone = fp.score(model, [(x, y)], code, group_size=2, seed=5)
        assert all(torch.equal(alone[n], together[code][n]) for n in alone)


def test_how_often_score_all_reads_the_data():
    class Counting(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    model, counted = conv_net(), Counting([data()])
    fp.score_all(model, counted, ["random", "magnitude"])
    assert counted.passes == 0
    fp.score_all(model, counted, ["fts", "snip", "fbss", "fisher_diag"])
    assert counted.passes == 1
    fp.score_all(model, counted, ["grasp", "grasp_reversed"])
    assert counted.passes == 3
    fp.score_all(model, counted, ["fts", "grasp"])
    assert counted.passes == 6


def test_chosen_parameters():
    model = conv_net()
    chosen = {n: p for n, p in model.named_parameters() if "bias" in n or "1." in n}
    scores = fp.score(model, [data()], "fisher_pruner", parameters=chosen)
    assert list(scores) == list(chosen)
    assert all(s.shape == chosen[n].shape for n, s in scores.items())


def test_mistakes_cost_no_pass_over_the_data():
    class Untouched(list):
        def __iter__(self):
            raise AssertionError("the data was read")

    model, unread = conv_net(), Untouched()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for options, match in [
        ({"criterion": "ftz"}, "unknown criterion 'ftz'"),
        ({"criterion": "none"}, "dense baseline"),
        ({"sparsity": 1.2}, "sparsity must be"),
        ({"scope": "block"}, "scope must be one of"),
        ({"group_size": 0}, "group_size must be"),
    ]:
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.prune(model, unread, **options)
    with pytest.raises(fp.FisherpruneError, match="a list of codes, got 'fts'"):
        fp.score_all(model, unread, "fts")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_scores_that_overflow_name_the_parameter():
    model = conv_net()
    with torch.no_grad():
        model[9].weight.mul_(1e30)
    parameters = {"9.weight": model[9].weight}
    with pytest.raises(
        fp.FisherpruneError, match="fisher_pruner score of '9.weight' is NaN or inf"
    ):
        fp.score(model, [data()], "fisher_pruner", parameters=parameters)


def test_progress_is_shown_where_asked_for(capfd):
    model, (x, y) = conv_net(), data()
    shown = {
        "gradient_moments": lambda **p: fp.gradient_moments(model, [(x, y)], **p),
        "gauss_newton_diagonal": lambda **p: fp.gauss_newton_diagonal(
            model, [(x, y)], **p
        ),
        "hessian_gradient": lambda **p: fp.score(model, [(x, y)], "grasp", **p),
        "gradient": lambda **p: fp.score_all(model, [(x, y)], ["fts"], **p),
        "gradient_mom": lambda **p: fp.prune(
            model, iter([(x, y)]), "fts", 0.5, ties="position", **p
        ),
    }
    for title, compute in shown.items():
        compute()
        assert capfd.readouterr() == ("", "")
        compute(progress=True)
        out, err = capfd.readouterr()
        assert not out and title in err
        if title != "gradient_mom":
            assert "0/1" in err and "batch/s" in err
