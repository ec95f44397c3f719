"""The operations that follow a layer in a forward pass: BatchNorm, residual sums, an activation."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_nettrim.core.activation import Rectifier


@dataclass(frozen=True)
class LayerContext:
    """How a layer is used in a forward pass: number of calls, and the operations between its output and its response.

    Attributes:
        calls: maximum number of calls in one forward pass.
        batchnorm: name of the BatchNorm with running statistics that is applied first; ``None`` if there is none.
        residual_sums: number of residuals that are added after it.
        rectifier: activation that is applied last; ``None`` if the response is linear.
    """

    calls: int
    batchnorm: str | None = None
    residual_sums: int = 0
    rectifier: Rectifier | None = None

    def __str__(self) -> str:
        """The operations in order, separated by commas."""
        operations = [*(["BatchNorm"] if self.batchnorm is not None else []), *["sum"] * self.residual_sums]
        return ", ".join([*operations, str(self.rectifier or "linear")])

    def equals(self, other: LayerContext) -> bool:
        """Whether the same operations follow; the numbers of calls may differ."""
        if (self.batchnorm, self.residual_sums) != (other.batchnorm, other.residual_sums):
            return False
        if self.rectifier is None or other.rectifier is None:
            return self.rectifier is other.rectifier
        return self.rectifier.equals(other.rectifier)
