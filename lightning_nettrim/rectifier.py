"""Rectifier: an activation that answers the same for many inputs: ReLU, ReLU6, Hardtanh, LeakyReLU, PReLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLATTEST = 1e-6
"""Least slope of a rectifier that has slopes: its answers still say what they were given."""


@dataclass(frozen=True, eq=False)
class Rectifier:
    """act(u) = min(max(u, low), high), plus slope·min(u, 0) where there is a slope.

    Args:
        low: answer to everything below it.
        high: answer to everything above it.
        slope: below zero, in [0, 1]: one for all outputs or ``(..., M)``, with bounds 0 and ∞; ``None`` is none.
    """

    low: float = 0.0
    high: float = float("inf")
    slope: Tensor | None = None

    def __call__(self, U: Tensor) -> Tensor:
        """act(U)."""
        bounded = U.clamp(self.low, self.high)
        return bounded if self.slope is None else bounded + self.slope * U.clamp(max=0)

    def inside(self, Y: Tensor) -> Tensor:
        """Ω: where an answer Y says what the input was, or says it with full weight."""
        return self.low < Y if self.high == float("inf") else (self.low < Y) & (self.high > Y)

    def inverse(self, Y: Tensor) -> Tensor:
        """The u < 0 that is answered with Y, where there is a slope."""
        assert self.slope is not None
        return Y / self.slope.clamp(min=FLATTEST)

    def same(self, other: Rectifier) -> bool:
        """Whether both answer alike to everything."""
        if (self.low, self.high) != (other.low, other.high) or (self.slope is None) != (other.slope is None):
            return False
        return self.slope is None or torch.equal(self.slope, other.slope)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Its name."""
        if self.slope is not None:
            return "LeakyReLU" if self.slope.numel() == 1 else "PReLU"
        return "ReLU" if (self.low, self.high) == (0, float("inf")) else f"clamp to [{self.low:g}, {self.high:g}]"
