"""The formulas of a layer's problem."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import layer

from lightning_nettrim import LayerProblem
from lightning_nettrim.core.activation import Rectifier


def test_the_trained_weights_have_no_error():
    problem = layer(bias=True)
    assert float(problem.local_error(problem.W)) <= 1e-12
    assert float(problem.objective(problem.W)) == pytest.approx(float(problem.W[:-1].abs().sum()))


def test_the_local_error_is_that_after_the_relu():
    X, W = torch.eye(2), torch.tensor([[3.0], [-5.0]])
    problem = LayerProblem(X, torch.tensor([[4.0], [0.0]]), W, torch.tensor(1.0), torch.tensor([[True], [False]]))
    assert float(problem.local_error(W)) == pytest.approx(0.25)
    assert float(replace(problem, Omega=None).local_error(W)) == pytest.approx((1 + 25) ** 0.5 / 4)


def test_the_number_of_zeros_is_rounded():
    problem = replace(layer(N=3, M=3, bias=True), sparsity=0.5)
    assert problem.nonzeros == 9 - round(4.5)


def test_a_problem_without_a_budget_says_which_one_is_missing():
    with pytest.raises(ValueError, match="expected a problem with a sparsity"):
        _ = layer().nonzeros
    with pytest.raises(ValueError, match="expected a problem with an epsilon"):
        _ = replace(layer(), epsilon=None).radius


def test_off_omega_lower_limits_are_negated():
    Y = torch.tensor([[0.0, 1.0, 0.5]])
    Omega = torch.tensor([[False, False, True]])
    problem = LayerProblem(torch.ones(1, 1), Y, torch.ones(1, 3), Omega=Omega, rectifier=Rectifier(0.0, 1.0))
    R = torch.tensor([[2.0, 3.0, 4.0]])
    assert problem.on_Omega(R).tolist() == [[0, 0, 4]]
    assert problem.off_Omega(R).tolist() == [[2, -3, 0]]


def test_groups_rank_their_weights_together():
    """The scores of the groups side by side, as columns of one layer."""
    X, W = torch.randn(4, 10, 3), torch.randn(4, 3, 5)
    problem = LayerProblem(X, X @ W, W, sparsity=0.6, groups=2)
    score = torch.rand(4, 3, 5)
    kept = problem.keep_largest(score, problem.kept_blocks)
    for first in (0, 2):
        limit = score[first : first + 2].flatten().sort(descending=True).values[problem.nonzeros - 1]
        assert torch.equal(kept[first : first + 2], score[first : first + 2] >= limit)
        assert bool((problem.layer_max(score)[first : first + 2] == score[first : first + 2].max()).all())


def test_a_subset_of_a_flattened_batch():
    members = [layer(P=20, seed=seed) for seed in range(4)]
    X, Y, W = (torch.stack([getattr(m, name) for m in members]).unflatten(0, (2, 2)) for name in ("X", "Y", "W"))
    epsilon = torch.tensor(1.0).expand(2, 2)
    flattened = LayerProblem(X, Y, W, epsilon=epsilon).flattened()
    assert flattened.batch == (4,)
    part = flattened.subset(torch.tensor([0, 3]))
    assert torch.equal(part.X, torch.stack([members[0].X, members[3].X]))
    assert part.epsilon.tolist() == [1, 1]
