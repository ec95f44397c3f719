"""What follows a layer in a forward pass: BatchNorm, residual residual_sums, an activation."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_nettrim.core.activation import Rectifier


@dataclass(frozen=True)
class LayerContext:
    """How one layer is used in a forward pass: how often, and all that its output meets before others read it.

    Attributes:
        calls: in one forward pass.
        batchnorm: name of the BatchNorm that it goes through first, by its running statistics.
        residual_sums: residual residual_sums that it goes through then.
        rectifier: what it meets last; ``None`` where its response is linear.
    """

    calls: int
    batchnorm: str | None = None
    residual_sums: int = 0
    rectifier: Rectifier | None = None

    def __str__(self) -> str:
        """What follows, in words."""
        steps = [*(["BatchNorm"] if self.batchnorm is not None else []), *["sum"] * self.residual_sums]
        return ", ".join([*steps, str(self.rectifier or "linear")])

    def equals(self, other: LayerContext) -> bool:
        """Whether the same follows, however often the layer is called."""
        if (self.batchnorm, self.residual_sums) != (other.batchnorm, other.residual_sums):
            return False
        if self.rectifier is None or other.rectifier is None:
            return self.rectifier is other.rectifier
        return self.rectifier.equals(other.rectifier)
