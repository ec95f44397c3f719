"""The refit, against the normal equations and an independent convex solver."""

from __future__ import annotations

from dataclasses import replace

import cvxpy as cp
import pytest
import torch
from problems import distance, layer

from lightning_nettrim import ADMM, Magnitude, refit, solve
from lightning_nettrim.core.activation import Rectifier


def pruned(problem, sparsity=0.6):
    return solve(replace(problem, sparsity=sparsity), Magnitude()).W


def test_a_linear_refit_solves_the_normal_equations():
    problem = layer(relu=False, bias=True)
    W = pruned(problem)
    fitted = refit(problem, W)
    for m in range(W.shape[1]):
        support = (W[:, m] != 0) | (problem.lambdas[:, 0] == 0)
        exact = torch.linalg.lstsq(problem.X[:, support], problem.Y[:, m : m + 1]).solution.squeeze(1)
        torch.testing.assert_close(fitted[support, m], exact, rtol=1e-5, atol=1e-6)


BOUNDED = {"bounds": (-0.5, 0.5), "residual": True, "bias": True}


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"cascade": True, "bias": True}, {"dead": True}, BOUNDED])
def test_a_relu_refit_reaches_the_convex_optimum(options):
    problem = layer(N=12, M=5, **options)
    W = pruned(problem)
    fitted = refit(problem, W)
    U, Omega = cp.Variable(W.shape), problem.Omega.double().numpy()
    XU = problem.X.numpy() @ U + (0 if problem.offset is None else problem.offset.numpy())
    V = (problem.Y if problem.V is None else problem.V).numpy()
    side = torch.where(problem.rectifier.high <= problem.Y, -1.0, 1.0).numpy()
    off = ((W == 0) & (problem.lambdas > 0)).double().numpy()
    on, above = cp.multiply(Omega, XU - problem.Y.numpy()), cp.multiply(1 - Omega, cp.pos(cp.multiply(side, XU - V)))
    cost = cp.sum_squares(on) + cp.sum_squares(above)
    best = cp.Problem(cp.Minimize(cost), [cp.multiply(off, U) == 0]).solve(solver=cp.CLARABEL)
    assert float(distance(problem, fitted)) ** 2 == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("slope", [0.01, 0.3, 1.0])
def test_errors_below_zero_are_weighted_by_the_square_of_the_slope(slope):
    problem = layer(N=12, M=5, residual=True)
    rectifier = Rectifier(slope=torch.tensor(slope, dtype=torch.float64))
    Z = problem.X @ problem.W + problem.offset
    problem = replace(problem, Y=rectifier(Z), rectifier=rectifier)
    W = pruned(problem)
    fitted = refit(problem, W)
    U, Omega = cp.Variable(W.shape), problem.Omega.double().numpy()
    R, XU = problem.X.numpy() @ U + (problem.offset - Z).numpy(), problem.X.numpy() @ U + problem.offset.numpy()
    cost = cp.sum_squares(cp.multiply(Omega + slope * (1 - Omega), R))
    cost += (1 - slope**2) * cp.sum_squares(cp.multiply(1 - Omega, cp.pos(XU)))
    off = (W == 0).double().numpy()
    best = cp.Problem(cp.Minimize(cost), [cp.multiply(off, U) == 0]).solve(solver=cp.CLARABEL)
    C = problem.X @ fitted + problem.offset
    reached = torch.where(problem.Omega, C - Z, slope * (C - Z)).square().sum()
    reached += (1 - slope**2) * torch.where(problem.Omega, 0, C.clamp(min=0)).square().sum()
    assert float(reached) == pytest.approx(best, rel=1e-4)
    torch.testing.assert_close(problem.response(problem.W), problem.Y)


@pytest.mark.parametrize("options", [{}, {"relu": False}, {"bias": True}, {"rank": 10}, {"P": 20}, {"scale": 1e4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_support_stays_and_the_distance_decreases(options, dtype):
    problem = layer(dtype=dtype, **options)
    W = solve(problem, ADMM()).W
    fitted = refit(problem, W)
    assert bool((fitted[W == 0] == 0).all()) or problem.penalty is not None
    penalized = (problem.lambdas > 0).expand_as(W)
    assert bool((fitted[(W == 0) & penalized] == 0).all())
    assert distance(problem, fitted) < distance(problem, W)


def test_the_trained_weights_are_their_own_refit():
    problem = layer()
    torch.testing.assert_close(refit(problem, problem.W), problem.W, rtol=0, atol=1e-9)
