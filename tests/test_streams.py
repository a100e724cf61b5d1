import torch

from fisherprune.streams import stream, stream_seed


def test_streams_differ_by_seed_and_name_and_repeat():
    seeds = {stream_seed(s, n) for s in range(20) for n in ("a", "b", "order")}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)
    draws = [torch.rand(4, generator=stream(7, "a")) for _ in range(2)]
    assert torch.equal(*draws)
