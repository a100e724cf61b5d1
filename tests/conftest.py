"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_random_numbers():
    """Draw other numbers in every run; the seed is shown where a test fails."""
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")


@pytest.fixture
def one_thread():
    """Run on one thread: in tiny layers threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
