"""Fixed seeds and one thread, so that a test gives the same numbers every time."""

import pytest
import torch

from recipes.data import MNIST


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_configure(config):
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def data():
    """MNIST, or the test is skipped where it can neither be found nor fetched."""
    module = MNIST()
    try:
        module.prepare_data()
    except (OSError, RuntimeError) as error:
        pytest.skip(f"MNIST is neither in {module.root} nor can it be downloaded ({error}): set NETTRIM_DATA")
    module.setup("fit")
    return module
