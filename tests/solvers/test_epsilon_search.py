"""The search for the sparsest solution within an epsilon, by solvers that take a sparsity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import layer

from lightning_nettrim import Cardinality, LayerProblem, Magnitude, SparseGPT, Wanda, parse_pattern, refit, solve
from lightning_nettrim.solvers import sparsest_within

SOLVERS = [Cardinality(max_steps=30), Magnitude(), Wanda(), SparseGPT()]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("refitted", [False, True])
@pytest.mark.parametrize("options", [{"bias": True}, {"relu": False}, {"cascade": True}], ids=str)
def test_the_solution_is_within_epsilon_and_a_sparser_one_is_not(solver, refitted, options):
    problem = layer(M=30, gain=0.3, **options)
    W = sparsest_within(problem, solver, refitted).W
    penalized = (problem.lambdas > 0).squeeze(-1)
    density = int(W[penalized].count_nonzero()) / problem.num_prunable
    assert 0 < density < 1
    assert float(problem.distance(W)) <= float(problem.epsilon)
    sparser = replace(problem, sparsity=1 - 0.9 * density)  # the last of 8 bisections is finer than this
    other = solve(sparser, solver).W
    other = refit(sparser, other) if refitted else other
    assert float(problem.distance(other)) > float(problem.epsilon)


def test_the_pattern_is_exact():
    problem = replace(layer(gain=0.4), pattern=parse_pattern("per_neuron"))
    solution = sparsest_within(problem, Wanda(), True)
    counts = solution.W.count_nonzero(0)
    assert counts.unique().numel() == 1
    assert 0 < int(counts[0]) < 40


def test_the_trained_weights_are_returned_if_nothing_sparse_is_within():
    problem = replace(layer(), W=torch.randn(40, 12, dtype=torch.float64))
    problem = replace(problem, Y=problem.X @ problem.W, Omega=None, epsilon=torch.tensor(1e-9).double())
    assert torch.equal(sparsest_within(problem, Magnitude(), False).W, problem.W)


def test_groups_share_one_epsilon():
    members = [layer(N=12, M=8, seed=seed, relu=False) for seed in range(3)]
    X, Y, W = (torch.stack([getattr(m, name) for m in members]) for name in ("X", "Y", "W"))
    W = W * torch.tensor([1.0, 0.1, 0.01]).double()[:, None, None]
    problem = LayerProblem(X, X @ W, W, epsilon=0.3 * torch.linalg.matrix_norm(X @ W), groups=3)
    solution = sparsest_within(problem, Cardinality(max_steps=30), True)
    radius = float(problem.epsilon.norm())
    assert float(problem.distance(solution.W).norm()) <= radius
    torch.testing.assert_close(solution.epsilon, torch.tensor(radius).double())
    counts = (solution.W != 0).sum((-2, -1)).tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
