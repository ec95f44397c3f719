"""The magnitude baseline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import layer

from lightning_nettrim import Magnitude, Status, solve


def test_keeps_the_largest_weights_and_the_bias():
    problem = replace(layer(bias=True), sparsity=0.75)
    solution = solve(problem, Magnitude())
    kept = solution.W[:-1] != 0
    assert int(kept.sum()) == problem.nonzeros
    assert problem.W[:-1][kept].abs().min() >= problem.W[:-1][~kept].abs().max()
    assert torch.equal(solution.W[-1], problem.W[-1])
    assert torch.equal(solution.W[:-1][kept], problem.W[:-1][kept])
    assert solution.status == Status.CONVERGED


def test_needs_a_sparsity():
    with pytest.raises(ValueError, match="sparsity"):
        solve(layer(), Magnitude())
