"""Fixed seeds and one thread, so that a test gives the same numbers every time."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_configure(config):
    torch.set_num_threads(min(2, torch.get_num_threads()))
