"""The precision of matrix products is set within a `with`, whichever of torch's settings the user has used."""

from dataclasses import replace

import pytest
import torch

from lightning_nettrim import Cardinality, solve, trim
from lightning_nettrim.core.precision import matmul_precision
from tests.problems import layer


def settings():
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:
        common = None
    return common, [getattr(backend, "fp32_precision", None) for backend in backends]


@pytest.fixture(params=["highest", "high", "medium", "cuda", "mkldnn"])
def users_settings(request):
    """What a user has set, by the interface for all backends or by that of one."""
    before, own = settings()
    if request.param in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(request.param)
    elif own[1] is None:
        pytest.skip("this version of torch has one precision for all backends")
    else:
        backend = {"cuda": torch.backends.cuda, "mkldnn": torch.backends.mkldnn}[request.param]
        backend.matmul.fp32_precision = {"cuda": "tf32", "mkldnn": "bf16"}[request.param]
    yield settings()
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_precision_is_set_within_and_restored_after(users_settings, precision):
    with matmul_precision(precision):
        assert torch.get_float32_matmul_precision() == precision
    assert settings() == users_settings


def test_an_exception_restores_the_precision(users_settings):
    with pytest.raises(KeyError), matmul_precision("highest"):
        raise KeyError
    assert settings() == users_settings


def test_solutions_do_not_depend_on_the_precision_that_a_user_has_set(users_settings):
    problem = replace(layer(dtype=torch.float32), epsilon=None, sparsity=0.5)
    W = solve(problem, Cardinality(max_steps=12)).W
    with matmul_precision("highest"):
        assert torch.equal(W, solve(problem, Cardinality(max_steps=12)).W)
    assert settings() == users_settings


def test_networks_are_pruned_in_full_precision(users_settings):
    seen = []

    class Model(torch.nn.Sequential):
        def forward(self, x):
            seen.append(torch.get_float32_matmul_precision())
            return super().forward(x)

    torch.manual_seed(0)
    trim(Model(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), [torch.randn(64, 12)], sparsity=0.5)
    assert set(seen) == {"highest"}
    assert settings() == users_settings
