"""The solution path: every radius is solved, in fewer steps than one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import layer, optimum

from lightning_nettrim import ADMM, Status, solve, solve_path


@pytest.mark.parametrize("options", [{"bias": True}, {"relu": False}, {"cascade": True}, {"per_neuron": True}])
@pytest.mark.parametrize("falling", [False, True])
def test_every_radius_is_solved(options, falling):
    problem = layer(P=150, N=25, **options)
    radii = [problem.epsilon * 1.3**k for k in range(5)]
    radii = radii[::-1] if falling else radii
    for epsilon, solution in zip(radii, solve_path(problem, radii), strict=True):
        assert solution.status == Status.CONVERGED
        assert float(solution.objective) == pytest.approx(optimum(replace(problem, epsilon=epsilon)), rel=1e-3)
        assert solution.W.shape == problem.W.shape


def test_it_takes_fewer_steps_than_one_by_one():
    problem = layer(P=1000, N=60, M=20, bias=True)
    radii = [0.08 * 1.05**k * problem.Y.norm() for k in range(8)]
    alone = [solve(replace(problem, epsilon=epsilon), ADMM()) for epsilon in radii]
    assert sum(int(s.steps) for s in solve_path(problem, radii)) < 0.7 * sum(int(s.steps) for s in alone)


def test_equal_radii_numbers_and_batches():
    members = [layer(seed=seed) for seed in (0, 1)]
    X, Y, W, Omega = (torch.stack([getattr(m, name) for m in members]) for name in ("X", "Y", "W", "Omega"))
    batch = replace(members[0], X=X, Y=Y, W=W, Omega=Omega, epsilon=None)
    solutions = solve_path(batch, [2.0, 2.0, 3.0])
    assert all(s.status.eq(Status.CONVERGED).all() for s in solutions)
    torch.testing.assert_close(solutions[0].objective, solutions[1].objective, rtol=2e-3, atol=0)
    assert bool((solutions[2].objective < solutions[1].objective).all())


def test_a_radius_of_zero_is_refused():
    with pytest.raises(ValueError, match="epsilon: expected > 0"):
        solve_path(layer(), [1.0, 0.0])
