"""Several ranks, each with a share of the samples, score as one process with all."""

import pytest
import ranks_job as job
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
    "prospr": "process_group must be None for the pass meta_gradient, which is not "
    "made for ranks, got a group",
    "ntk_sap": "process_group must be None for the pass ntk_sap, which is not made for "
    "ranks, got a group",
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


def test_a_process_group_without_a_job():
    net = torch.nn.Linear(4, 3)
    with pytest.raises(fp.FisherpruneError, match="None or a ProcessGroup .* got 3"):
        fp.prune(net, [], process_group=3)
