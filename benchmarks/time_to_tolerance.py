"""The time that a solver needs to reach a given tolerance, measured from the weights of its solutions alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from benchmarks.peers import Trial
from benchmarks.peers.ours import solve_timed
from benchmarks.scoring import Score, cast, score
from lightning_nettrim import ADMM, LayerProblem

TOLERANCE = 1e-3
"""Of the objective, relative to the optimum, and of the violation, relative to ε."""

ScoredTrial = tuple[Trial, Score]


class Reference(NamedTuple):
    """The optimum of a problem, known up to a relative error of ``gap``."""

    optimum: float
    gap: float
    seconds: float

    def score_trials(self, problem: LayerProblem, trials: Iterable[Trial]) -> Iterator[ScoredTrial]:
        """Each trial with its score."""
        exact = cast(problem, dtype=torch.float64)
        for trial in trials:
            yield trial, score(exact, trial.W, trial.seconds, self.optimum)


def reference(problem: LayerProblem, max_steps: int = 5000) -> Reference:
    """The mean of the objective and the best lower bound of a long run in float64, and their relative difference."""
    exact = cast(problem, dtype=torch.float64)
    solution, seconds = solve_timed(exact, ADMM(max_steps=max_steps, rtol=1e-5, atol=1e-5))
    optimum = float(solution.objective + solution.bound) / 2
    return Reference(optimum, float(solution.gap), seconds)


def is_within_tolerance(scored: ScoredTrial) -> bool:
    """Whether the trial is within the tolerance."""
    return scored[1].optimality_error <= TOLERANCE


def run_until_tolerance(trials: Iterable[ScoredTrial], max_seconds: float = float("inf")) -> list[ScoredTrial]:
    """The trials up to the first one within the tolerance, or until their total run time exceeds a limit."""
    run, total = [], 0.0
    for scored in trials:
        run.append(scored)
        total += scored[0].seconds
        if is_within_tolerance(scored) or total > max_seconds:
            break
    return run


def bisect_steps(
    run: list[ScoredTrial], run_steps: Callable[[int], ScoredTrial], max_trials: int = 2
) -> list[ScoredTrial]:
    """Bisect the number of steps between the last trial outside the tolerance and the first one within it.

    Args:
        run: the trials that `run_until_tolerance` returns.
        run_steps: runs the solver from the beginning with the given number of steps.
        max_trials: maximum number of additional trials.

    Returns:
        All trials, in order of their numbers of steps.
    """
    if len(run) < 2 or not is_within_tolerance(run[-1]):
        return run
    run = list(run)
    for _ in range(max_trials):
        index = next(i for i, scored in enumerate(run) if is_within_tolerance(scored))
        if index == 0:
            break
        low, high = (run[i][0].steps for i in (index - 1, index))
        run.insert(index, run_steps((low + high) // 2))
    return run
