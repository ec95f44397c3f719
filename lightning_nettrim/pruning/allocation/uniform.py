"""The same sparsity in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_nettrim.pruning.allocation.balancing import balance
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.session import CalibrationSession


@dataclass(frozen=True)
class UniformAllocation(Allocation):
    """The same sparsity in every layer, within the limits of each."""

    def allocate(self, session: CalibrationSession, sparsity: float) -> dict[str, Budget]:
        """The budget of every layer."""
        sizes = session.shared_sizes()
        total = kept_in_total(sizes, sparsity)
        kept = balance(lambda t: {n: t * size for n, size in sizes.items()}, (0.0, 1.0), total, session.kept_bounds())
        return session.budgets_keeping(kept)


def kept_in_total(sizes: dict[str, int], sparsity: float) -> int:
    """Number of weights that a sparsity keeps of all layers together."""
    size = sum(sizes.values())
    return size - round(sparsity * size)
