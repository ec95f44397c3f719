"""Other solvers of the same program, each with a ``NAME`` and a ``solve(problem, **settings)`` that yields trials."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Trial(NamedTuple):
    """An answer and what it costs to get it from nothing."""

    W: Tensor  # (N, M) on the CPU
    seconds: float
    steps: int | None = None


class Unavailable(Exception):
    """The solver's dependency, clone or device is not here."""


class TimedOut(Exception):
    """The solver had no answer when its time was over."""
