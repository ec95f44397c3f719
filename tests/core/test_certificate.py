"""Certificates of the convex program, against an independent solver and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import VARIANTS, layer, optimum

from lightning_nettrim import LayerProblem
from lightning_nettrim.core.certificate import dual_bound, duality_gap, violation, violation_and_price


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_dual_point_gives_a_lower_bound(options):
    problem = layer(**options)
    best = optimum(problem)
    for size in (1e-3, 1.0, 1e3):
        nu = size / problem.X.norm() * torch.randn_like(problem.Y)
        guess = nu if problem.Omega is None else torch.where(problem.Omega, nu.abs(), nu)
        assert float(dual_bound(problem, guess)) <= best * (1 + 1e-6) + 1e-9
        assert float(dual_bound(problem, guess + problem.Y * size)) <= best * (1 + 1e-6) + 1e-9


def two_sample_problem():
    """Two samples with one input each: one active output with target 1, one inactive output."""
    X, W = torch.eye(2), torch.tensor([[4.0], [0.7]])
    Y, Omega = torch.tensor([[1.0], [0.0]]), torch.tensor([[True], [False]])
    return LayerProblem(X, Y, W, epsilon=torch.tensor(2.0), Omega=Omega)


def test_a_violation_is_priced_by_the_dual_point():
    problem = two_sample_problem()
    excess, price = violation_and_price(problem, problem.W, torch.tensor([[-5.0], [-10.0]]))
    assert float(excess) == pytest.approx(0.5)
    assert float(price) == pytest.approx(5 * 1 + 10 * 0.7)


def test_the_violation_is_the_larger_excess_over_epsilon():
    problem = two_sample_problem()
    assert float(violation(problem, problem.W)) == pytest.approx((3.0 - 2.0) / 2.0)
    lower = replace(problem, V=torch.tensor([[0.0], [-2.0]]))
    assert float(violation(lower, problem.W)) == pytest.approx(2.7 / 2.0)
    assert float(violation(problem, torch.tensor([[1.5], [-1.0]]))) == 0


def test_the_trained_weights_are_feasible():
    problem = layer(bias=True)
    assert float(violation(problem, problem.W)) <= 1e-12


def test_the_gap_is_relative_to_the_largest_of_three_sizes():
    problem = two_sample_problem()  # ‖W‖₁ = 4.7
    objective, bound = torch.tensor(4.0), torch.tensor(3.0)
    assert float(duality_gap(problem, objective, bound)) == pytest.approx(1 / 4)
    assert float(duality_gap(problem, bound, objective)) == pytest.approx(-1 / 4)
    tiny = torch.tensor(1e-6)
    assert float(duality_gap(problem, tiny, torch.zeros(()))) == pytest.approx(1e-6 / 4.7e-3)
    assert float(duality_gap(replace(problem, W=torch.zeros(2, 1)), torch.zeros(()), torch.zeros(()))) == 0
