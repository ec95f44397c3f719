"""Search for the sparsest solution within an epsilon, by a solver that takes a sparsity."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.solvers.base import Solution, Solver, solve
from lightning_nettrim.solvers.refitting import refit

MAX_DENSITY, MIN_DENSITY = 1.0, 0.002
"""Range of the search."""


def sparsest_within(problem: LayerProblem, solver: Solver, refit_solutions: bool, trials: int = 8) -> Solution:
    """The sparsest of several solutions with ‖response − Y‖ ≤ ε; the trained weights if there is none.

    The logarithm of the density is bisected.

    Args:
        problem: one problem, or those of the groups of one layer; its sparsity is not used.
        solver: a method that takes a sparsity.
        refit_solutions: refit each solution before its error is measured, and return it refitted.
        trials: number of solutions.
    """
    radius = torch.linalg.vector_norm(problem.radius)
    best, warm = solve(replace(problem, sparsity=0.0), solver), None
    feasible, infeasible = MAX_DENSITY, MIN_DENSITY
    for _ in range(trials):
        density = (feasible * infeasible) ** 0.5
        at = replace(problem, sparsity=1 - density)
        solution = solve(at, solver, warm)
        warm = solution.state
        if refit_solutions:
            solution = replace(solution, W=refit(at, solution.W))
        if bool(torch.linalg.vector_norm(problem.distance(solution.W)) <= radius):
            best, feasible = solution, density
        else:
            infeasible = density
    return replace(best, epsilon=radius)
