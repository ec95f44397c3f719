"""Proximal maps, against their definitions by brute force."""

from __future__ import annotations

import pytest
import torch

from lightning_nettrim.prox import project_topk, reflect_relu_ball, soft_threshold


def test_soft_threshold_minimises_its_objective():
    T, S = torch.linspace(-2, 2, 41).double(), torch.linspace(-3, 3, 6001).double()
    cost = 0.7 * S.abs() + 0.5 * (S - T[:, None]) ** 2
    torch.testing.assert_close(soft_threshold(T, torch.tensor(0.7).double()), S[cost.argmin(1)], atol=1.1e-3, rtol=0)
    assert soft_threshold(T, torch.tensor(0.7).double()).count_nonzero() == (T.abs() > 0.7).sum()


@pytest.mark.parametrize("balls", [(-2, -1), (-2,)])
@pytest.mark.parametrize("relu", [True, False])
def test_half_the_way_to_the_reflection_is_inside_and_nearest(balls, relu):
    D = torch.randn(3, 6, 4).double()
    Omega = torch.rand(3, 6, 4) < 0.5 if relu else None
    radius = torch.full((3, 1, 4 if balls == (-2,) else 1), 0.4).double()

    def project(A):
        return (A - reflect_relu_ball(A, radius, Omega, balls)) / 2

    Z = project(D)
    on = Z if Omega is None else torch.where(Omega, Z, 0)
    assert bool((on.square().sum(balls, keepdim=True).sqrt() <= radius + 1e-12).all())
    assert Omega is None or bool(((Z <= 0) | Omega).all())
    torch.testing.assert_close(project(Z), Z)
    for _ in range(200):  # the angle at a projection is obtuse to every point of the set
        assert ((D - Z) * (project(torch.randn_like(D)) - Z)).sum() <= 1e-9


def test_the_reflection_of_a_point_inside_is_its_opposite():
    D = torch.rand(5, 3) - 0.5
    assert torch.equal(reflect_relu_ball(D, torch.full((1, 1), 10.0)), -D)


def test_the_reflection_is_written_where_asked():
    D, Omega, out, work = torch.randn(5, 3), torch.rand(5, 3) < 0.5, torch.empty(5, 3), torch.empty(5, 3)
    expected = reflect_relu_ball(D, torch.ones(1, 1), Omega)
    assert reflect_relu_ball(D, torch.ones(1, 1), Omega, out=out, work=work) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("k", [0, 1, 7, 20])
def test_topk_keeps_exactly_the_largest(k):
    W = torch.randn(2, 4, 5)
    S = project_topk(W, k)
    assert S.count_nonzero(dim=(-2, -1)).tolist() == [k, k]
    for kept, all_ in zip(S, W, strict=True):
        assert torch.equal(kept[kept != 0].abs().sort().values, all_.abs().flatten().sort().values[20 - k :])


def test_topk_with_ties_is_still_exact():
    assert project_topk(torch.ones(3, 3), 4).sum() == 4
