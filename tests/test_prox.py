"""Proximal maps, against their definitions by brute force."""

from __future__ import annotations

import pytest
import torch

from lightning_nettrim.prox import project_relu_ball, project_topk, soft_threshold


def test_soft_threshold_minimises_its_objective():
    T, S = torch.linspace(-2, 2, 41).double(), torch.linspace(-3, 3, 6001).double()
    cost = 0.7 * S.abs() + 0.5 * (S - T[:, None]) ** 2
    torch.testing.assert_close(soft_threshold(T, 0.7), S[cost.argmin(1)], atol=1.1e-3, rtol=0)
    assert soft_threshold(T, 0.7).count_nonzero() == (T.abs() > 0.7).sum()


@pytest.mark.parametrize("balls", [(-2, -1), (-2,)])
def test_projection_is_inside_and_nearest(balls):
    T, Y, V = torch.randn(3, 6, 4).double(), torch.rand(3, 6, 4).double(), torch.rand(3, 6, 4).double() - 0.5
    Omega = torch.rand(3, 6, 4) < 0.5
    radius = torch.full((3, 1, 4 if balls == (-2,) else 1), 0.4).double()
    Z = project_relu_ball(T, Y, radius, Omega, V, balls)

    def inside(A, slack):
        norm = torch.where(Omega, A - Y, 0).square().sum(balls, keepdim=True).sqrt()
        return bool((norm <= radius + slack).all()) and bool(((V + slack >= A) | Omega).all())

    assert inside(Z, 1e-12)
    torch.testing.assert_close(project_relu_ball(Z, Y, radius, Omega, V, balls), Z)
    for _ in range(200):  # the angle at a projection is obtuse to every point of the set
        other = project_relu_ball(Y + torch.randn_like(Y), Y, radius, Omega, V, balls)
        assert ((T - Z) * (other - Z)).sum() <= 1e-9


def test_a_point_inside_stays():
    Y = torch.rand(5, 3)
    T = Y + 0.01
    assert torch.equal(project_relu_ball(T, Y, torch.ones(1, 1)), Y + (T - Y))


@pytest.mark.parametrize("k", [0, 1, 7, 20])
def test_topk_keeps_exactly_the_largest(k):
    W = torch.randn(2, 4, 5)
    S = project_topk(W, k)
    assert S.count_nonzero(dim=(-2, -1)).tolist() == [k, k]
    for kept, all_ in zip(S, W, strict=True):
        assert torch.equal(kept[kept != 0].abs().sort().values, all_.abs().flatten().sort().values[20 - k :])


def test_topk_with_ties_is_still_exact():
    assert project_topk(torch.ones(3, 3), 4).sum() == 4
