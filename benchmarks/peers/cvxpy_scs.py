"""SCS, a first-order method for cone programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.peers import Trial, cone
from lightning_nettrim import LayerProblem

NAME = "SCS"


def solve(
    problem: LayerProblem, minutes: float = 10, tolerances: Iterable[float] = (1e-3, 1e-4, 1e-6)
) -> Iterator[Trial]:
    """One run for each tolerance, absolute and relative, in decreasing order; see `cone.solve`."""
    settings = ({"time_limit_secs": 60 * minutes, "max_iters": 10**9, "eps_abs": t, "eps_rel": t} for t in tolerances)
    return cone.solve(problem, "SCS", settings, minutes)
