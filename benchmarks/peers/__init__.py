"""Other implementations to compare with.

A solver of the convex program has a ``NAME`` and a ``solve(problem, **options)`` that yields trials. A method for
one-shot pruning has a ``NAME`` and a ``method(clone)`` that returns a function which prunes one layer.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Trial(NamedTuple):
    """A solution and the cost of computing it from the beginning."""

    W: Tensor  # (N, M) on the CPU
    seconds: float
    steps: int | None = None


class Unavailable(Exception):
    """A dependency, clone or device of the solver is missing."""


class TimedOut(Exception):
    """The solver returned no solution within its time limit."""
