"""One layer at many radii: the whole curve of sparsity against error, each point started from its neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.solvers.admm import ADMM, ADMMState
from lightning_nettrim.solvers.base import Solution, Status, iterate
from lightning_nettrim.sums import norm

_MOVING = ("W", "S", "T", "D", "G")  # what of a state depends on the radius and is smooth in its logarithm


def path(problem: LayerProblem, epsilons: Iterable[Tensor | float], solver: ADMM | None = None) -> list[Solution]:
    """Solve the problem at every radius in turn, best in a monotone order.

    The factor is shared. Copies and duals are extrapolated linearly in log ε from the two radii before, ρ is kept in
    proportion to 1/ε; where that does not converge, ρ moves as in a single solve.

    Args:
        problem: the layer's program; its own ``epsilon`` and ``sparsity`` are not read.
        epsilons: radii in the units of ``Y``, each of any shape that ``problem.epsilon`` may have, or a number for all.
        solver: settings; the defaults where ``None``.

    Returns:
        A `Solution` for each radius, in the order given.

    Raises:
        ValueError: if the problem is malformed or a radius is not positive.
    """
    solver, solutions = solver or ADMM(), list[Solution]()
    state = before = None
    sizes: list[Tensor] = []
    with torch.no_grad():
        shared = problem.compressed()
        for epsilon in epsilons:
            at = replace(shared, epsilon=_radius(problem, epsilon), sparsity=None).validate()
            sizes.append(norm(at.flat().radius))
            if state is None:
                solution = iterate(at, solver)
            else:
                state = solver.penalise(state, sizes[-2] / sizes[-1])
                here = state._replace(**{name: getattr(state, name).clone() for name in _MOVING})
                if before is not None:
                    _extrapolate(state, solver.penalise(before, before.tau / state.tau), sizes)
                before = here
                short = replace(solver, max_steps=max(1, solver.max_steps // 4))
                solution = iterate(at, short, state, adaptive=False)
                if not bool((solution.status == Status.CONVERGED).all()):
                    solution = iterate(at, solver)
            state = solution.state
            solutions.append(replace(solution, state=None))
    return solutions


def _extrapolate(state: ADMMState, before: ADMMState, sizes: list[Tensor]) -> None:
    """Carry the state on along the line through the one before, as far as log ε goes on, at most as far again."""
    ahead = (sizes[-1] / sizes[-2]).log() / (sizes[-2] / sizes[-3]).log()
    ahead = ahead.nan_to_num(0.0).clamp(0, 1)
    for name in _MOVING:
        now = getattr(state, name)
        now.copy_(torch.lerp(getattr(before, name), now, 1 + ahead))


def _radius(problem: LayerProblem, epsilon: Tensor | float) -> Tensor:
    """ε as the problem wants it: a tensor as it is, a number for every ball of every layer."""
    if isinstance(epsilon, Tensor) and epsilon.dim() >= len(problem.batch):
        return epsilon
    return torch.as_tensor(epsilon).to(problem.Y).expand(problem.batch)
