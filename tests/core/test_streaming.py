"""Blocks of rows and compressed problems have the same values as the whole problem."""

from __future__ import annotations

import pytest
import torch
from problems import layer, optimum

from lightning_nettrim.core.certificate import dual_bound, violation
from lightning_nettrim.core.streaming import compress, gram, row_blocks


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"per_neuron": True}, {"rank": 15}, {"cascade": True}])
def test_a_compressed_problem_has_the_same_solutions(options):
    problem = layer(P=500, relu=False, **options)
    small = compress(problem)
    assert small.X.shape[0] == problem.X.shape[1] + 1
    for W in (torch.zeros_like(problem.W), problem.W + 0.1 * torch.randn_like(problem.W)):
        torch.testing.assert_close(violation(small, W), violation(problem, W), rtol=1e-9, atol=1e-9)
    assert optimum(small) == pytest.approx(optimum(problem), rel=1e-5)


def test_problems_that_cannot_be_compressed_are_returned_as_they_are():
    for problem in (layer(), layer(relu=False, P=25)):
        assert compress(problem) is problem


def test_row_blocks_are_the_rows_in_order(monkeypatch):
    problem = layer(residual=True, cascade=True, bias=True)
    nu = torch.randn_like(problem.Y) * 1e-2
    expected = violation(problem, problem.W * 0.5), dual_bound(problem, nu)
    assert [rows for rows, _ in row_blocks(problem)] == [slice(0, 200)]
    monkeypatch.setattr("lightning_nettrim.core.streaming.BLOCK", 1000)
    blocks = list(row_blocks(problem))
    assert len(blocks) == 9
    for name in ("X", "Y", "Omega", "V", "offset"):
        assert torch.equal(torch.cat([getattr(part, name) for _, part in blocks]), getattr(problem, name))
    for rows, part in blocks:
        assert torch.equal(part.X, problem.X[rows])
    torch.testing.assert_close((violation(problem, problem.W * 0.5), dual_bound(problem, nu)), expected)


def test_the_gram_matrix_is_in_float64():
    problem = layer(dtype=torch.float32).flattened()
    X = problem.X.double()
    H = gram(problem)
    assert H.dtype == torch.float64
    torch.testing.assert_close(H, X.mT @ X, rtol=1e-4, atol=1e-4)
