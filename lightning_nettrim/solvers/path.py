"""Solution path: one layer at a sequence of radii, each solve with a warm start from the previous ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_nettrim.core.precision import matmul_precision
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.reductions import norm
from lightning_nettrim.core.streaming import compress
from lightning_nettrim.core.validation import validate
from lightning_nettrim.solvers.admm import ADMM, ADMMState
from lightning_nettrim.solvers.base import Solution, Status, iterate

_EXTRAPOLATED = ("W", "S", "T", "D", "G")  # fields of a state that are smooth functions of log ε


@matmul_precision("highest")
def solve_path(problem: LayerProblem, epsilons: Iterable[Tensor | float], solver: ADMM | None = None) -> list[Solution]:
    """Solve a problem at a sequence of radii, preferably monotone.

    All solves share one factorization. Copies and duals are extrapolated linearly in log ε from the two previous radii,
    with ρ proportional to 1/ε; if this does not converge, the problem is solved without a warm start.

    Args:
        problem: the problem of a layer; its ``epsilon`` and ``sparsity`` are not used.
        epsilons: radii in the units of ``Y``, each of any shape that ``problem.epsilon`` may have, or a number for the
            whole batch.
        solver: the solver with its settings; ``None`` is ``ADMM()``.

    Returns:
        A `Solution` for each radius, in the given order.

    Raises:
        ValueError: if the problem is malformed or a radius is not positive.
    """
    solver, solutions = solver or ADMM(), list[Solution]()
    state = previous = None
    radii: list[Tensor] = []
    with torch.no_grad():
        shared = compress(problem)
        for epsilon in epsilons:
            at = validate(replace(shared, epsilon=_radius(problem, epsilon), sparsity=None))
            radii.append(norm(at.flattened().radius))
            if state is None:
                solution = iterate(at, solver)
            else:
                state = solver.penalize(state, radii[-2] / radii[-1])
                current = state._replace(**{name: getattr(state, name).clone() for name in _EXTRAPOLATED})
                if previous is not None:
                    _extrapolate(state, solver.penalize(previous, previous.tau / state.tau), radii)
                previous = current
                short = replace(solver, max_steps=max(1, solver.max_steps // 4))
                solution = iterate(at, short, state, adaptive=False)
                assert solution.status is not None
                if not bool((solution.status == Status.CONVERGED).all()):
                    solution = iterate(at, solver)
            state = solution.state
            solutions.append(replace(solution, state=None))
    return solutions


def _extrapolate(state: ADMMState, previous: ADMMState, radii: list[Tensor]) -> None:
    """Extrapolate the state, in place and linearly in log ε, by at most the difference to the previous state."""
    ratio = (radii[-1] / radii[-2]).log() / (radii[-2] / radii[-3]).log()
    ratio = ratio.nan_to_num(0.0).clamp(0, 1)
    for name in _EXTRAPOLATED:
        value = getattr(state, name)
        value.copy_(torch.lerp(getattr(previous, name), value, 1 + ratio))


def _radius(problem: LayerProblem, epsilon: Tensor | float) -> Tensor:
    """ε in a shape that the problem accepts; a number is expanded to the whole batch."""
    if isinstance(epsilon, Tensor) and epsilon.dim() >= len(problem.batch):
        return epsilon
    return torch.as_tensor(epsilon).to(problem.Y).expand(problem.batch)
