"""Proximal maps and projections, against their definitions by brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from lightning_nettrim import LayerProblem, parse_pattern
from lightning_nettrim.core.activation import Rectifier
from lightning_nettrim.core.prox import project_pattern, project_responses, reflect_relu_ball, soft_threshold


def test_soft_threshold_minimizes_its_objective():
    T, S = torch.linspace(-2, 2, 41).double(), torch.linspace(-3, 3, 6001).double()
    cost = 0.7 * S.abs() + 0.5 * (S - T[:, None]) ** 2
    torch.testing.assert_close(soft_threshold(T, torch.tensor(0.7).double()), S[cost.argmin(1)], atol=1.1e-3, rtol=0)
    assert soft_threshold(T, torch.tensor(0.7).double()).count_nonzero() == (T.abs() > 0.7).sum()


@pytest.mark.parametrize("ball_dims", [(-2, -1), (-2,)])
@pytest.mark.parametrize("relu", [True, False])
def test_the_projection_is_feasible_and_nearest(ball_dims, relu):
    D = torch.randn(3, 6, 4).double()
    Omega = torch.rand(3, 6, 4) < 0.5 if relu else None
    radius = torch.full((3, 1, 4 if ball_dims == (-2,) else 1), 0.4).double()

    def project(A):
        return (A - reflect_relu_ball(A, radius, Omega, ball_dims)) / 2

    Z = project(D)
    on = Z if Omega is None else torch.where(Omega, Z, 0)
    assert bool((on.square().sum(ball_dims, keepdim=True).sqrt() <= radius + 1e-12).all())
    assert Omega is None or bool(((Z <= 0) | Omega).all())
    torch.testing.assert_close(project(Z), Z)
    for _ in range(200):  # the angle at a projection is obtuse to every point of the set
        assert ((D - Z) * (project(torch.randn_like(D)) - Z)).sum() <= 1e-9


def test_the_reflection_of_a_feasible_point_is_its_negative():
    D = torch.rand(5, 3) - 0.5
    assert torch.equal(reflect_relu_ball(D, torch.full((1, 1), 10.0)), -D)


def test_the_reflection_is_written_to_the_given_buffer():
    D, Omega, out, work = torch.randn(5, 3), torch.rand(5, 3) < 0.5, torch.empty(5, 3), torch.empty(5, 3)
    expected = reflect_relu_ball(D, torch.ones(1, 1), Omega)
    assert reflect_relu_ball(D, torch.ones(1, 1), Omega, out=out, work=work) is out
    assert torch.equal(out, expected)


PATTERNS = ["unstructured", "per_neuron", "2:4", "1:4", "4:8", "neuron", "2x4", "4x2"]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_projection_on_a_pattern_is_the_nearest_by_brute_force(name, batch, bias):
    W = torch.randn(*batch, 8 + bias, 4)
    penalty = torch.tensor([1.0] * 8 + [0.0] * bias)
    pattern = parse_pattern(name)
    problem = LayerProblem(W.mT, W.mT @ W, W, sparsity=pattern.sparsity or 0.5, pattern=pattern, penalty=penalty)
    S = project_pattern(problem, W)
    assert bool(((S == W) | (S == 0)).all())
    assert torch.equal(S[..., 8:, :], W[..., 8:, :])
    assert (S[..., :8, :] != 0).sum((-2, -1)).eq(problem.nonzeros).all()
    for kept, all_ in zip(S[..., :8, :].reshape(-1, 8, 4), W[..., :8, :].reshape(-1, 8, 4), strict=True):
        blocks, sizes = pattern.to_blocks(kept)[..., 0] != 0, pattern.to_blocks(all_).square().sum(-1)
        for chosen, size in zip(blocks, sizes, strict=True):
            best = (
                max(size[list(c)].sum() for c in combinations(range(len(size)), int(chosen.sum())))
                if len(size) < 17
                else size.sort(descending=True).values[: int(chosen.sum())].sum()
            )
            torch.testing.assert_close(size[chosen].sum(), best)


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.7, 0.999])
def test_ties_and_zeros_are_filled_up_to_the_exact_count(sparsity):
    ones = torch.ones(6, 5)
    problem = LayerProblem(torch.ones(1, 6), torch.ones(1, 5), ones, sparsity=sparsity)
    assert project_pattern(problem, ones).count_nonzero() == problem.nonzeros == 30 - round(30 * sparsity)
    assert project_pattern(problem, torch.zeros(6, 5)).count_nonzero() == problem.nonzeros


@pytest.mark.parametrize("bounds", [(0.0, float("inf")), (-0.5, 0.5)])
def test_the_projection_on_the_responses_is_the_nearest_point_with_the_same_response(bounds):
    rectifier, offset = Rectifier(*bounds), torch.randn(50, 4)
    Y = rectifier(torch.randn(50, 4))
    X, W = torch.eye(50), torch.randn(50, 4)
    problem = LayerProblem(X, Y, W, Omega=rectifier.active(Y), rectifier=rectifier, offset=offset, sparsity=0.5)
    T = project_responses(problem, X @ W)
    torch.testing.assert_close(rectifier(T + offset), Y)
    grid = torch.linspace(-8, 8, 3201).reshape(-1, 1, 1)
    same = (rectifier(grid + offset) - Y).abs() < 3e-3
    distance = torch.where(same, (grid - W).abs(), torch.inf).amin(0)
    torch.testing.assert_close((T - W).abs(), distance, atol=6e-3, rtol=0)
