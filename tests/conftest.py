"""Fixed seeds and few threads, so that a test gives the same numbers every time, beside others."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from recipes.data import MNIST


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _short_latencies():
    """The latency of a compact network is measured for a shorter time; no test depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("lightning_nettrim.pruning.units.latency"), "MIN_SECONDS", 1e-3)
        yield


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, torch.get_num_threads() // workers)))


def pytest_collection_modifyitems(items):
    """Tests on MNIST come first: their files take longest, and at the end they would leave another worker idle."""
    items.sort(key=lambda item: "data" not in item.fixturenames)


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
