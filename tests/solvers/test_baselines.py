"""Magnitude, Wanda and SparseGPT, by their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import layer

from lightning_nettrim import Magnitude, SparseGPT, Wanda, parse_pattern, solve


def test_magnitude_keeps_the_largest_weights_and_the_bias():
    problem = replace(layer(bias=True), sparsity=0.75)
    solution = solve(problem, Magnitude())
    kept = solution.W[:-1] != 0
    assert int(kept.sum()) == problem.nonzeros
    assert problem.W[:-1][kept].abs().min() >= problem.W[:-1][~kept].abs().max()
    assert torch.equal(solution.W[-1], problem.W[-1])
    assert torch.equal(solution.W[:-1][kept], problem.W[:-1][kept])
    assert solution.status is None


def test_wanda_ranks_by_weight_times_energy():
    problem = replace(layer(bias=True), sparsity=0.6, pattern=parse_pattern("per_neuron"))
    W = solve(problem, Wanda()).W[:-1]
    score = problem.W[:-1].abs() * problem.X[:, :-1].norm(dim=0)[:, None]
    for kept, size in zip(W.mT != 0, score.mT, strict=True):
        assert size[kept].min() >= size[~kept].max()


def test_sparsegpt_compensates_each_weight_on_the_inputs_after_it():
    """The optimal brain surgeon's update, with the inverse of the Hessian of the remaining inputs."""
    problem = replace(layer(N=12, M=5), sparsity=0.5)
    W = solve(problem, SparseGPT()).W
    H = problem.X.mT @ problem.X
    H += 0.01 * H.diagonal().mean() * torch.eye(12, dtype=H.dtype)
    expected = problem.W.clone()
    for i in range(12):
        rest = torch.linalg.inv(H[i:, i:])
        lost = torch.where(W[i] == 0, expected[i], 0)
        expected[i:] -= rest[0][:, None] / rest[0, 0] * lost
    torch.testing.assert_close(W, torch.where(W == 0, 0, expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("arguments", "name"), [({"block_size": 0}, "block_size"), ({"damping": 0.0}, "damping")])
def test_invalid_settings_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"SparseGPT.{name}: expected > 0"):
        SparseGPT(**arguments)
