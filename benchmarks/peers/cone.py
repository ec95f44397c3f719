"""The convex program for general cone solvers, by CVXPY.

The time that CVXPY needs to compile the program is not counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.peers import TimedOut, Trial, Unavailable
from lightning_nettrim import LayerProblem

try:
    import cvxpy as cp
except ImportError:
    cp = None


def solve(problem: LayerProblem, solver: str, settings: Iterator[dict[str, Any]], minutes: float) -> Iterator[Trial]:
    """One run without a warm start for each set of options.

    Args:
        problem: one problem, without batch dimensions.
        solver: name of the solver in CVXPY.
        settings: options of each run.
        minutes: time limit of each run.

    Raises:
        Unavailable: if CVXPY or the solver is not installed.
        TimedOut: if a run exceeds its time limit or returns no solution.
    """
    if cp is None or solver not in cp.installed_solvers():
        raise Unavailable(f"{solver} is not installed: pip install -e '.[bench]'")
    program, W = _program(problem)
    for options in settings:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an inaccurate solution is scored like any other
            try:
                program.solve(solver=solver, warm_start=False, **options)
            except cp.SolverError as error:
                raise TimedOut(f"{solver} returned no solution") from error
        stats = program.solver_stats
        seconds = (stats.setup_time or 0.0) + stats.solve_time
        if W.value is None or program.status == cp.USER_LIMIT or seconds > 60 * minutes:
            raise TimedOut(f"{solver} returned no solution in {minutes:g} minutes")
        yield Trial(torch.from_numpy(W.value).clone(), seconds, stats.num_iters)


def _program(problem: LayerProblem) -> tuple[cp.Problem, cp.Variable]:
    """Σ λ|W| over W with one cone for the residual on Ω and one linear constraint for each entry off Ω."""
    X, Y, lambdas = (t.double().numpy() for t in (problem.X, problem.Y, problem.lambdas))
    on = (torch.ones_like(problem.Y) if problem.Omega is None else problem.Omega).bool().numpy()
    V = (torch.zeros_like(problem.Y) if problem.V is None else problem.V).double().numpy()
    W = cp.Variable(problem.W.shape)
    columns = range(Y.shape[1])
    residual = [X[on[:, m]] @ W[:, m] - Y[on[:, m], m] for m in columns if on[:, m].any()]
    limits = [X[~on[:, m]] @ W[:, m] <= V[~on[:, m], m] for m in columns if not on[:, m].all()]
    ball = cp.norm(cp.hstack(residual), 2) <= float(problem.epsilon)
    return cp.Problem(cp.Minimize(cp.sum(cp.multiply(lambdas, cp.abs(W)))), [ball, *limits]), W
