"""Clarabel, an interior-point method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.peers import Trial, cone
from lightning_nettrim import LayerProblem

NAME = "Clarabel"


def solve(
    problem: LayerProblem, minutes: float = 10, tolerances: Iterable[float] = (1e-3, 1e-4, 1e-6)
) -> Iterator[Trial]:
    """One run for each tolerance of gap and feasibility, in decreasing order; see `cone.solve`."""
    names = ("tol_gap_abs", "tol_gap_rel", "tol_feas")
    settings = ({"time_limit": 60 * minutes, **dict.fromkeys(names, t)} for t in tolerances)
    return cone.solve(problem, "CLARABEL", settings, minutes)
