"""Several ranks, each with a share of the samples, score as one process with all."""

import pytest
import ranks_job as job
import shard_calls
import torch
import truth

import fisherprune as fp

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fisherprune.FisherpruneWarning"),
]

FAILED = "process_group: rank {} failed: "


@pytest.fixture(scope="module")
def seed():
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    return seed


@pytest.fixture(scope="module")
def ranks(seed, tmp_path_factory):
    return job.run_job(seed, tmp_path_factory.mktemp("ranks"))


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        same = torch.equal(found[name], each) if torch.is_tensor(each) else None
        assert found[name] == each if same is None else same, name


def assert_close(found, expected, error):
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        if torch.is_tensor(each) and each.is_floating_point():
            assert truth.relative_error(found[name], each.double()) < error, name
        elif torch.is_tensor(each) and each.dtype == torch.bool:
            assert (found[name] != each).sum() <= 2, name  # near-ties
        else:
            assert_same_bits({name: found[name]}, {name: each})


@pytest.mark.parametrize("name", job.CALLS)
def test_all_ranks_end_with_the_same_bits_as_one_process_up_to_rounding(
    ranks, seed, name
):
    counts, call = job.CALLS[name]
    batches = [b for share in job.batches_of(seed, counts) for b in share]
    one = call(job.network(seed), batches)
    first, *others = (each["calls"][name] for each in ranks)
    for other in others:
        assert_same_bits(other, first)
    assert any(t.count_nonzero() for t in one.values() if torch.is_tensor(t))
    assert_close(first, one, 2e-6)
    if counts == job.FIRST:  # zeros are added to the sums of one rank
        assert_same_bits(first, one)


def test_the_same_ranks_find_the_same_bits_again(ranks):
    for each in ranks:
        assert_same_bits(each["again"], each["calls"]["moments"])
        assert_same_bits(each["calls"]["in parts"], each["calls"]["moments"])


def test_groups_are_those_of_each_rank(ranks, seed):
    shares = [share for share in job.batches_of(seed, job.UNEVEN) if share]
    net, found = job.network(seed), ranks[0]["partial"]
    first, *others = (fp.gradient_moments(net, b, group_size=3) for b in shares)
    both = sum(others, first)
    assert both.groups == 4 + 1 + 5
    assert found["counts"].tolist() == [both.samples, both.groups, 0]
    for name, total in both.sum.items():
        assert truth.relative_error(found[name], total.double()) < 1e-6
        square = both.sum_sq[name].double()
        assert truth.relative_error(found[f"{name} squared"], square) < 1e-6
    parts = []
    for share in shares:
        net, data, named = job.rows(share)
        options = {"group_size": 3, "parameters": named}
        parts.append(fp.gradient_moments(net, data, **options))
    for name, mean in sum(parts[1:], parts[0]).mean.items():
        score = ranks[0]["partial gradient"][f"grad_norm {name}"]
        assert truth.relative_error(score, mean.abs().double()) < 1e-5
    for each in ranks[1:]:
        assert_same_bits(each["partial"], found)


def test_a_group_of_some_ranks_counts_these_alone(ranks, seed):
    shares = job.batches_of(seed, job.UNEVEN)
    batches = [b for rank in job.SUBSET for b in shares[rank]]
    one = job.moments(job.network(seed), batches)
    found = [ranks[rank]["subset"] for rank in job.SUBSET]
    assert_same_bits(*found)
    assert_close(found[0], one, 1e-6)
    told, own = (ranks[rank]["subset told"] for rank in job.SUBSET)
    assert told == FAILED.format(3) + own and own.endswith("TypeError: no such loss")


def test_ranks_draw_different_labels(ranks, seed):
    """With the same, two ranks of the same samples would have twice the sums."""
    batches = job.batches_of(seed, (6,))[0]
    one = job.moments(job.network(seed), batches, labels="sampled")
    found = ranks[0]["sampled"]
    for name in ("0.weight", "9.weight"):
        assert truth.relative_error(found[name], 2 * one[name].double()) < 1e-6
        squares = found[f"{name} squared"], 2 * one[f"{name} squared"].double()
        assert truth.relative_error(*squares) > 1e-3
    for each in ranks[1:]:
        assert_same_bits(each["sampled"], found)


SAME = "process_group: {} must be the same on all ranks, got "
MISTAKES = {
    "loss": (2, "TypeError: no such loss"),
    "loss of moments": (2, "TypeError: no such loss"),
    "loss of grasp": (2, "TypeError: no such loss"),
    "labels": (1, "labels"),
    "fewer": (3, "batches must hold the same 8 samples again, got 4"),
    "loss of prospr": (2, "TypeError: no such loss"),
    "batches of one": (1, "batches must be an iterable of (inputs, labels) tensors"),
    "argument": (0, "group_size must be an integer of at least 1, got 0"),
}
DIFFERENCES = {
    "weights": ("the values of '9.weight'", "on rank 0 and checksum "),
    "shapes": ("tensor '0.weight'", "float32 [3, 4], trainable on rank 0 and "),
    "criterion": ("criteria", "['snip'] on rank 0 and ['fts'] on rank 1"),
    "seed": ("seed", "0 on rank 0 and 1 on rank 3"),
    "batches": ("batches", "again on rank 0 and an iterator on rank 1"),
}
ALIKE = {
    "empty": "gradient_moments: batches must hold samples, got none",
    "empty flow": "synaptic_flow: batches must hold samples, got none",
    "empty gradient": "hutchinson_diagonal: batches must hold samples, got none",
    "group": "process_group must be None or a ProcessGroup of torch.distributed with "
    "this rank in it, got 'WORLD'",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_all_ranks_stop_where_one_fails(ranks, name):
    failing, text = MISTAKES[name]
    own = ranks[failing]["told"][name]
    assert text in own and "process_group" not in own
    for each in ranks[:failing] + ranks[failing + 1 :]:
        assert each["told"][name] == FAILED.format(failing) + own


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_ranks_must_have_alike(ranks, name):
    what, got = DIFFERENCES[name]
    for each in ranks:
        assert each["told"][name].startswith(SAME.format(what))
        assert got in each["told"][name]


@pytest.mark.parametrize("name", ALIKE)
def test_mistakes_of_all_ranks(ranks, name):
    for each in ranks:
        assert each["told"][name] == ALIKE[name]


def test_other_mistakes(ranks):
    for each in ranks:
        assert "on rank 0 and" in each["told"]["calls"]
        assert "a ProcessGroup of torch.distributed" in each["told"]["other group"]


SHARDS = "process_group must be of all ranks that hold shards of the model's parameters"
WHOLE = "must be whole ({}), got '0.weight' in shards"
OF_SHARDS = {
    "no group": f"{SHARDS}, got None",
    "no group, moments": f"{SHARDS}, got None",
    "other group": f"{SHARDS}, got ",
    "tensor parallel": "process_group must be of ranks that have batches of their own",
    "two ways": "process_group must be of ranks that have batches of their own",
    "flat": "model: FullyShardedDataParallel hides parameters in flat ones",
    "structure": "structure must be weights where scores are in shards",
    "copy": "parameters "
    + WHOLE.format(
        "score the model before it is split: ntk_sap draws weights in a copy"
    ),
    "check": "check: parameters "
    + WHOLE.format("check the model before it is split, or a copy"),
    "file": "save: masks " + WHOLE.format("masks.whole().save(path) on one rank"),
    "moments file": "save: moments "
    + WHOLE.format("moments.whole().save(path) on one rank"),
    "shuffle": "shuffle_masks: masks "
    + WHOLE.format("shuffle_masks(masks.whole()), the same masks on each rank"),
    "paths": "effective_masks: parameters "
    + WHOLE.format("of the same model before it is split, with masks.whole()"),
    "forward": "gradient_moments: the model failed on batch 0 ",
    "no batches": "gradient_moments: batches must hold samples, got none",
    "infinite": "the loss must be finite, got inf",
}


@pytest.mark.parametrize("name", OF_SHARDS)
def test_mistakes_with_parameters_in_shards(ranks, name):
    for each in ranks:
        assert each["shards"]["told"][name].startswith(OF_SHARDS[name])


def test_all_ranks_stop_where_batches_of_one_fail(ranks):
    told = [each["shards"]["told"]["batches"] for each in ranks]
    failed = FAILED.format(1) + "OSError: no such file"
    assert told == [failed, "no such file", failed, failed]


@pytest.fixture(scope="module")
def one(seed):
    """Return a function for the network that ranks have in shards, and all batches."""
    shares = job.batches_of(seed, shard_calls.COUNTS)
    every = [batch for share in shares for batch in share]
    return lambda: (shard_calls.plain(seed, job.network), every)


def moments_of_groups(net, batches):
    named = dict(net.named_parameters())
    found = fp.gradient_moments(net, batches, parameters=named, group_size=3)
    return found.sum | {f"{n} squared": 2 * t for n, t in found.sum_sq.items()}


def pruned_half(net, batches):
    fp.prune(net, batches, "fisher_diag", 0.5, ties="position")
    return {n: p.detach() for n, p in net.named_parameters()}


def halves(net, batches):
    return dict(fp.find_masks(net, batches, "fisher_diag", [0.5], ties="position")[0])


IN_SHARDS = {
    "moments": moments_of_groups,
    "scores": job.scores(shard_calls.CODES, settings=shard_calls.FEW),
    "estimates": shard_calls.estimates,
    "masks": job.masks,
    "two dimensions": halves,
    "whole": halves,
    "pruned": pruned_half,
    "applied": pruned_half,
}


@pytest.mark.parametrize("name", IN_SHARDS)
def test_shards_have_the_bits_of_one_process_with_all_batches(ranks, one, name):
    expected = IN_SHARDS[name](*one())
    assert any(t.count_nonzero() for t in expected.values())
    for each in ranks:
        assert_same_bits(each["shards"][name], expected)


def test_each_rank_keeps_what_belongs_to_its_shards(ranks, one):
    net, _ = one()
    for name, p in net.named_parameters():
        parts = [each["shards"]["sizes"][name] for each in ranks]
        assert sum(part[0] for part in parts) == len(p), name
        assert max(part[0] for part in parts) == -(-len(p) // job.RANKS)
    for each in ranks:
        found = each["shards"]
        assert found["as found"] and found["counts"] == 4
        assert all(way != ("loop",) for way in found["paths"].values())


def test_a_model_in_the_shards_of_two_ranks(ranks, seed):
    shares = job.batches_of(seed, shard_calls.COUNTS)
    net = shard_calls.plain(seed, job.network)
    expected = job.moments(net, [b for rank in job.SUBSET for b in shares[rank]])
    for rank in job.SUBSET:
        assert_same_bits(ranks[rank]["shards"]["subset"], expected)


def test_masks_in_shards_say_what_whole_ones_do(ranks, one):
    net, batches = one()
    masks = fp.Masks(halves(net, batches))
    other = fp.find_masks(net, batches, "random", [0.3])[0]
    expected = shard_calls.facts(masks, other)
    for each in ranks:
        found = each["shards"]
        assert found["facts"] == expected
        shown = f"Masks(5 parameters, {masks.total()} weights, in shards)"
        assert found["repr"] == shown


def test_masks_are_held_in_shards(ranks, one, seed):
    net, batches = one()
    masks = fp.Masks(halves(net, batches))
    expected = shard_calls.trained(net, masks, job.batches_of(seed, (6,))[0])
    for each in ranks:
        found = each["shards"]["trained"]
        assert_close(found, expected, 1e-5)
        for name in masks:
            held = found[f"held {name}"]
            assert torch.equal(held, expected[f"held {name}"])
            assert not found[name][~held].any()
            assert not found[f"momentum {name}"][~held].any()
    split = ranks[0]["shards"]["split"]
    assert split["0.weight"].count_nonzero() == 4
    assert split["2.weight"].count_nonzero() == 5


def test_equal_scores_in_shards_are_kept_by_their_place(ranks, seed):
    scores, among = shard_calls.tensors(seed)
    expected = shard_calls.selected(scores, among)
    equal = {n: 0 * t for n, t in scores.items()}
    tied = shard_calls.told(lambda: fp.select_masks(equal, 0.75))
    assert "equal scores" in tied
    for each in ranks:
        assert_same_bits(each["shards"]["selected"], expected)
        assert each["shards"]["tied"] == tied


@pytest.mark.parametrize("name", job.ALONE)
def test_ranks_that_score_alone_are_warned(ranks, name):
    for each in ranks:
        assert "each of the 4 ranks of torch.distributed" in each["warned"][name]


def test_a_process_group_without_a_job():
    net = torch.nn.Linear(4, 3)
    with pytest.raises(fp.FisherpruneError, match="None or a ProcessGroup .* got 3"):
        fp.prune(net, [], process_group=3)
