"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_random_numbers():
    """Draw other numbers in every run; the seed is shown where a test fails."""
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")
