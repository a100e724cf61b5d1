"""Ranks that hold a model by tensor parallelism score as one process does."""

import pytest
import ranks_job
import tensor_parallel_job as job
import tensor_parallel_nets as nets
import torch
import truth
from shard_calls import whole
from torch.nn import functional as F

import fisherprune as fp

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fisherprune.FisherpruneWarning"),
]


@pytest.fixture(scope="module")
def seed():
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    return seed


@pytest.fixture(scope="module")
def ranks(seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    return ranks_job.run_job(seed, folder, job.run_rank)


def all_rows(seed):
    return [batch for row in job.batches_of(seed) for batch in row]


def loop(net, batches, group_size):
    """Return sums of mean gradients and of squares, by a loop over groups."""
    net = net.double()
    named = dict(net.named_parameters())
    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    sums, squares = ({n: torch.zeros_like(p) for n, p in named.items()} for _ in "ab")
    for some, labels in zip(x.split(group_size), y.split(group_size), strict=True):
        loss = F.cross_entropy(net(some), labels)
        for name, grad in zip(
            named, torch.autograd.grad(loss, [*named.values()]), strict=True
        ):
            sums[name] += grad
            squares[name] += grad.square()
    return sums, squares


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert torch.equal(found[name], each), name


def assert_close(found, expected, error):
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        if each.dtype == torch.bool:
            assert (found[name] != each).sum() <= 2, name  # near-ties
        else:
            assert truth.relative_error(found[name], each.double()) < error, name


NETS = {
    "rows": (nets.transformer, 1),
    "columns": (nets.transformer, 1),
    "sequence": (nets.transformer, 1),
    "rows sharded": (nets.transformer, 1),
    "sequence sharded": (nets.transformer, 1),
    "rows of four": (nets.transformer, 3),
    "columns of four": (nets.transformer, 3),
    "sequence of four": (nets.transformer, 3),
    "tied": (job.tied, 1),
    "scaled": (job.scaled, 1),
    "uneven": (lambda seed: job.seeded(seed, job.uneven), 1),
    "split samples": (lambda seed: job.seeded(seed, job.split_samples), 1),
}


@pytest.mark.parametrize("name", NETS)
def test_moments_are_those_of_a_loop_over_samples(ranks, seed, name):
    make, group_size = NETS[name]
    batches = all_rows(seed)
    if name in ("uneven", "split samples"):
        batches = job.few_tokens(batches)
    expected = loop(make(seed), batches, group_size)
    count = sum(job.COUNTS)
    for each in ranks:
        sums, squares, counts, _ = each[name]
        assert counts == (count, -(-count // group_size))
        assert_close(sums, expected[0], 1e-5)
        assert_close(squares, expected[1], 1e-5)
        assert_same_bits(sums, ranks[0][name][0])
        assert_same_bits(squares, ranks[0][name][1])


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_found_by_the_rules_of_whole_layers(ranks, seed, name):
    net = NETS[name][0](seed)
    batches = job.few_tokens(all_rows(seed))
    expected = fp.gradient_moments(net, batches, parameters=job.every(net)).paths
    looped = {"scaled": ["mlp.up.weight"], "split samples": ["1.scale", "1.side"]}
    expected |= dict.fromkeys(looped.get(name, []), ("loop",))
    for each in ranks:
        assert each[name][3] == expected


def test_a_call_without_a_rule_is_looped_over_and_named(ranks):
    for each in ranks:
        (text,) = each["warned"]
        assert "the model ran once more for each sample alone" in text
        assert "of 'mlp.up.weight' (mul: what is computed from it is split" in text


def test_each_rank_keeps_what_belongs_to_its_part(ranks, seed):
    net = job.every(nets.transformer(seed))
    for name, (_, (placement,)) in ranks[0]["sizes"].items():
        parts = [each["sizes"][name][0] for each in ranks]
        if placement.is_shard():
            sizes = [part[placement.dim] for part in parts]
            assert sum(sizes) == net[name].shape[placement.dim]
            assert max(sizes) == -(-sum(sizes) // job.RANKS)
        else:
            assert {*parts} == {tuple(net[name].shape)}
    assert len(ranks[0]["sizes"]) == 14


@pytest.mark.parametrize("plan", ["rows", "sequence"])
def test_shards_of_parts_are_shared_out_over_both_dimensions(ranks, seed, plan):
    parts = [each[f"{plan} sharded sizes"] for each in ranks]
    for name, p in nets.transformer(seed).named_parameters():
        copies = 1 if p.dim() == 2 or name[-6:] in ("q.bias", "v.bias") else 2
        copies = 1 if name in ("mlp.up.bias", "head.bias") else copies
        assert sum(each[name] for each in parts) == copies * p.numel(), name


def test_drawn_labels_are_those_of_one_process(ranks, seed):
    net = nets.transformer(seed)
    options = {"labels": "sampled", "parameters": job.every(net)}
    expected = fp.gradient_moments(net, all_rows(seed), **options).sum_sq
    for each in ranks:
        assert_close(each["sampled"], expected, 1e-5)


@pytest.mark.parametrize("name", ["scores", "scores of rows", "scores of shards"])
def test_scores_are_those_of_one_process(ranks, seed, name):
    expected = job.scores(nets.transformer(seed), all_rows(seed))
    for each in ranks:
        if name != "scores of rows":
            assert_close(each[name], expected, 1e-4)
        else:  # probes are drawn by each row
            some = [n for n in expected if not n.startswith("hutchinson")]
            found = {n: each[name][n] for n in some}
            assert_close(found, {n: expected[n] for n in some}, 1e-4)
        assert_same_bits(each[name], ranks[0][name])
        assert each["as found"]


@pytest.mark.parametrize("name", ["masks", "masks of shards"])
def test_masks_are_those_of_one_process(ranks, seed, name):
    expected = job.masks(nets.transformer(seed), all_rows(seed))
    for each in ranks:
        assert_close(each[name], expected, 0)
        assert_same_bits(each[name], ranks[0][name])
        for scope in job.SCOPES:
            kept, wanted = (
                sum(int(m.sum()) for n, m in some.items() if n.startswith(scope))
                for some in (each[name], expected)
            )
            assert kept == wanted


def test_a_pruned_model_trains_as_in_one_process(ranks, seed):
    expected = whole(job.trained(nets.transformer(seed), all_rows(seed)))
    for each in ranks:
        assert_close(each["trained"], expected, 1e-4)
        for name, mask in each["trained"].items():
            if name.startswith("mask"):
                assert not each["trained"][name.removeprefix("mask ")][~mask].any()


READING = [
    "tensor parallelism: rank 1 failed: OSError: no such file",
    "no such file",
    "process_group: rank 0 failed: tensor parallelism: rank 1 failed: OSError: no such "
    "file",
    "process_group: rank 1 failed: OSError: no such file",
]
SAME = "tensor parallelism: {} must be the same on all ranks, got "
TOLD = {
    "group": "process_group must be of ranks that have batches of their own, but its "
    "ranks [0, 1, 2, 3] hold parts of the same parameters",
    "batches": SAME.format("batches: tensor 0"),
    "fewer": SAME.format("batches") + "at their end on rank 0 and a batch on rank 2",
    "weights": SAME.format("the values of 'first.weight'"),
    "seed": SAME.format("seed") + "0 on rank 0 and 1 on rank 1",
    "two dimensions": "parameters: 'head.weight' is split over DeviceMesh",
    "two meshes": "parameters: 'extra.weight' is split over DeviceMesh",
    "no group": "process_group must be of all ranks that hold shards",
    "group of all": "process_group must be of ranks that have batches of their own, ",
    "per head": "parameters: the gradients of 'attention.scale' differ on the ranks",
    "losses": "gradient_moments: tensor parallelism: the losses must be the same on "
    "all ranks of a mesh, got the norms ",
    "sizes": "tensor parallelism: the pass needs whole parameters, with which the "
    "model fails",
    "structure": "structure must be weights where scores are in shards",
    "offload": "offload must be None where parameters are in shards",
    "no batches": "gradient_moments: batches must hold samples, got none",
}


@pytest.mark.parametrize("name", TOLD)
def test_mistakes(ranks, name):
    for each in ranks:
        assert f"{each['told'][name]}".startswith(TOLD[name])


def test_all_ranks_stop_where_one_can_not_read_its_batches(ranks):
    assert [each["told"]["reading"] for each in ranks] == READING
