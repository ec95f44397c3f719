"""The refit: against normal equations and against an independent convex solver."""

from __future__ import annotations

from dataclasses import replace

import cvxpy as cp
import pytest
import torch
from problems import layer

from lightning_nettrim import ADMM, Magnitude, refit, solve


def distance(problem, W):
    XW = problem.X @ W
    R = XW - problem.Y
    if problem.Omega is not None:
        V = 0 if problem.V is None else problem.V
        R = torch.where(problem.Omega, R, (XW - V).clamp(min=0))
    return float(R.norm())


def pruned(problem, sparsity=0.6):
    return solve(replace(problem, sparsity=sparsity), Magnitude()).W


def test_a_linear_refit_solves_the_normal_equations():
    problem = layer(relu=False, bias=True)
    W = pruned(problem)
    fitted = refit(problem, W)
    for m in range(W.shape[1]):
        support = (W[:, m] != 0) | (problem.weights[:, 0] == 0)
        exact = torch.linalg.lstsq(problem.X[:, support], problem.Y[:, m : m + 1]).solution.squeeze(1)
        torch.testing.assert_close(fitted[support, m], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"cascade": True, "bias": True}, {"dead": True}])
def test_a_relu_refit_reaches_the_convex_optimum(options):
    problem = layer(N=12, M=5, **options)
    W = pruned(problem)
    fitted = refit(problem, W)
    U, Omega = cp.Variable(W.shape), problem.Omega.double().numpy()
    XU = problem.X.numpy() @ U
    V = 0 if problem.V is None else problem.V.numpy()
    off = ((W == 0) & (problem.weights > 0)).double().numpy()
    on, above = cp.multiply(Omega, XU - problem.Y.numpy()), cp.multiply(1 - Omega, cp.pos(XU - V))
    cost = cp.sum_squares(on) + cp.sum_squares(above)
    best = cp.Problem(cp.Minimize(cost), [cp.multiply(off, U) == 0]).solve(solver=cp.CLARABEL)
    assert distance(problem, fitted) ** 2 == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"relu": False}, {"bias": True}, {"rank": 10}, {"P": 20}, {"scale": 1e4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_support_stays_and_the_distance_falls(options, dtype):
    problem = layer(dtype=dtype, **options)
    W = solve(problem, ADMM()).W
    fitted = refit(problem, W)
    assert bool((fitted[W == 0] == 0).all()) or problem.penalty is not None
    penalised = (problem.weights > 0).expand_as(W)
    assert bool((fitted[(W == 0) & penalised] == 0).all())
    assert distance(problem, fitted) < distance(problem, W)


def test_the_trained_weights_are_their_own_refit():
    problem = layer()
    torch.testing.assert_close(refit(problem, problem.W), problem.W, rtol=0, atol=1e-9)
