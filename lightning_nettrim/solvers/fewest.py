"""Fewest: by a method that takes a sparsity, the fewest weights whose response stays within a radius."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.solvers.base import Solution, Solver, solve
from lightning_nettrim.solvers.refit import refit

DENSEST, SPARSEST = 1.0, 0.002
"""Densities between which is searched."""


def fewest(problem: LayerProblem, solver: Solver, refitted: bool, trials: int = 8) -> Solution:
    """The sparsest of some solutions with ‖response − Y‖ ≤ ε; the trained weights if there is none.

    The logarithm of the density is bisected.

    Args:
        problem: one program, or those of the groups of one layer; its sparsity is not read.
        solver: a method that takes a sparsity.
        refitted: judge a solution after its refit, and return it so.
        trials: solutions.
    """
    radius = torch.linalg.vector_norm(problem.radius)
    best, warm = solve(replace(problem, sparsity=0.0), solver), None
    good, bad = DENSEST, SPARSEST
    for _ in range(trials):
        density = (good * bad) ** 0.5
        at = replace(problem, sparsity=1 - density)
        solution = solve(at, solver, warm)
        warm = solution.state
        if refitted:
            solution = replace(solution, W=refit(at, solution.W))
        if bool(torch.linalg.vector_norm(problem.distance(solution.W)) <= radius):
            best, good = solution, density
        else:
            bad = density
    return replace(best, epsilon=radius)
