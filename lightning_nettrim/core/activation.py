"""Piecewise linear activations with a ReLU's properties: ReLU, ReLU6, Hardtanh, LeakyReLU, PReLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SLOPE = 1e-6
"""Smallest slope that a `Rectifier` with a slope is treated as having, so that it has an inverse."""


@dataclass(frozen=True, eq=False)
class Rectifier:
    """act(u) = min(max(u, low), high), plus slope·min(u, 0) if there is a slope.

    Args:
        low: lower bound of the response.
        high: upper bound of the response.
        slope: slope below zero, in [0, 1]: a scalar or ``(..., M)``, with the bounds 0 and ∞; ``None`` is no slope.
    """

    low: float = 0.0
    high: float = float("inf")
    slope: Tensor | None = None

    def __call__(self, U: Tensor) -> Tensor:
        """act(U)."""
        bounded = U.clamp(self.low, self.high)
        return bounded if self.slope is None else bounded + self.slope * U.clamp(max=0)

    def active(self, Y: Tensor) -> Tensor:
        """Ω: where the response Y is strictly between the bounds."""
        return self.low < Y if self.high == float("inf") else (self.low < Y) & (self.high > Y)

    def inverse(self, Y: Tensor) -> Tensor:
        """The u < 0 with act(u) = Y; for a rectifier with a slope."""
        assert self.slope is not None
        return Y / self.slope.clamp(min=MIN_SLOPE)

    def equals(self, other: Rectifier) -> bool:
        """Whether both are the same function."""
        if (self.low, self.high) != (other.low, other.high) or (self.slope is None) != (other.slope is None):
            return False
        return self.slope is None or torch.equal(self.slope, other.slope)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Name of the activation."""
        if self.slope is not None:
            return "LeakyReLU" if self.slope.numel() == 1 else "PReLU"
        return "ReLU" if (self.low, self.high) == (0, float("inf")) else f"clamp to [{self.low:g}, {self.high:g}]"
