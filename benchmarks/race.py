"""Time to accuracy: what a solver needs until the judge, who sees its weights alone, is content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from benchmarks.objective import Score, cast, score
from benchmarks.peers import Trial
from benchmarks.peers.ours import timed
from lightning_nettrim import ADMM, LayerProblem

TOLERANCE = 1e-3  # of the objective, relative to the optimum, and of the violation, relative to ε

Judged = tuple[Trial, Score]


class Reference(NamedTuple):
    """The optimum of a program, known to within ``gap``."""

    optimum: float
    gap: float
    seconds: float

    def judge(self, problem: LayerProblem, trials: Iterable[Trial]) -> Iterator[Judged]:
        """Each trial with its score."""
        exact = cast(problem, dtype=torch.float64)
        for trial in trials:
            yield trial, score(exact, trial.W, trial.seconds, self.optimum)


def reference(problem: LayerProblem, max_steps: int = 5000) -> Reference:
    """The middle between objective and best lower bound of a long run in float64, and their relative distance."""
    exact = cast(problem, dtype=torch.float64)
    solution, seconds = timed(exact, ADMM(max_steps=max_steps, rtol=1e-5, atol=1e-5))
    optimum = float(solution.objective + solution.bound) / 2
    return Reference(optimum, float(solution.gap), seconds)


def passed(judged: Judged) -> bool:
    """Whether the criterion is met."""
    return judged[1].error <= TOLERANCE


def first(race: Iterable[Judged], seconds: float = float("inf")) -> list[Judged]:
    """The trials up to the first that meets the criterion, or until the runs together took so many seconds."""
    run, spent = [], 0.0
    for judged in race:
        run.append(judged)
        spent += judged[0].seconds
        if passed(judged) or spent > seconds:
            break
    return run


def bisect(run: list[Judged], again: Callable[[int], Judged], rounds: int = 2) -> list[Judged]:
    """Narrow the number of steps between the last trial that fails and the first that passes.

    Args:
        run: as `first` returns it.
        again: a trial, from nothing, with that many steps.
        rounds: trials more.

    Returns:
        All trials in the order of their steps; the criterion is first met where it is first met among them.
    """
    if len(run) < 2 or not passed(run[-1]):
        return run
    run = list(run)
    for _ in range(rounds):
        index = next(i for i, judged in enumerate(run) if passed(judged))
        if index == 0:
            break
        low, high = (run[i][0].steps for i in (index - 1, index))
        run.insert(index, again((low + high) // 2))
    return run
