"""What all solvers that take a sparsity have in common: exact counts in every pattern, batches, refused problems."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import distance, layer

from lightning_nettrim import Cardinality, LayerProblem, Magnitude, SparseGPT, Wanda, parse_pattern, refit, solve
from lightning_nettrim.solvers.base import coarse_products

SOLVERS = [Cardinality(), Magnitude(), Wanda(), SparseGPT(), SparseGPT(block_size=8)]
PATTERNS = ["unstructured", "per_neuron", "2:4", "1:4", "4:8", "neuron", "4x4"]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{"bias": True}, {"relu": False}, {"dead": True}, {"P": 25, "cascade": True}], ids=str
)
def test_counts_are_exact_in_every_pattern(solver, pattern, dtype, options):
    problem = layer(dtype=dtype, **options)
    problem = replace(problem, W=problem.W + 0.01 * torch.randn(problem.W.shape, dtype=dtype), epsilon=None)
    problem = replace(problem, sparsity=parse_pattern(pattern).sparsity or 0.75, pattern=parse_pattern(pattern))
    solution = solve(problem, solver)
    W = solution.W[:40]
    assert solution.W.dtype == dtype
    assert solution.W.isfinite().all()
    assert int(W.count_nonzero()) == problem.nonzeros
    blocks = (problem.pattern.to_blocks(W) != 0).any(-1)
    assert bool((blocks.sum(-1) == problem.kept_blocks).all())
    fitted = refit(problem, solution.W)
    assert torch.equal(fitted[:40] != 0, W != 0) or pattern == "4x4" or options.get("dead")
    assert bool((fitted[:40][W == 0] == 0).all())
    if solver == Cardinality():
        baseline = refit(problem, solve(problem, Magnitude()).W)
        assert distance(problem, fitted) <= distance(problem, baseline) * (1 + 1e-5)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_sparsity_of_zero_returns_the_trained_layer(solver):
    problem = replace(layer(bias=True), sparsity=0.0)
    assert torch.allclose(solve(problem, solver).W, problem.W, rtol=0, atol=0)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_equal_to_its_members(solver, pattern, dtype):
    members = [layer(N=48, M=16, dtype=dtype, seed=seed) for seed in range(3)]
    shared = {"sparsity": 0.5, "pattern": parse_pattern(pattern)}
    stacked = {name: torch.stack([getattr(m, name) for m in members]) for name in ("X", "Y", "W", "Omega")}
    batched = solve(LayerProblem(**stacked, **shared), solver)
    assert batched.status is None
    for i, member in enumerate(members):
        problem = LayerProblem(*(getattr(member, n) for n in ("X", "Y", "W")), Omega=member.Omega, **shared)
        alone = solve(problem, solver)
        assert torch.equal(batched.W[i] != 0, alone.W != 0)
        fitted = (refit(problem, W) for W in (batched.W[i], alone.W))  # the rounding of products depends on the batch
        torch.testing.assert_close(*fitted, rtol=0, atol=1e-6)
        assert alone.status is None


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_problem_without_a_sparsity_is_refused(solver):
    with pytest.raises(ValueError, match="expected a problem with a sparsity"):
        solve(layer(), solver)


def test_coarse_products_are_allowed_within_the_context_only():
    before = torch.get_float32_matmul_precision()
    with coarse_products(False):
        assert torch.get_float32_matmul_precision() == before
    with coarse_products(True):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
