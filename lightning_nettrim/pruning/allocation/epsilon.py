"""One relative error of the responses, common to all layers: the allocation of Net-Trim."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_nettrim.pruning.allocation.balancing import balance
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.allocation.curves import measure_curves
from lightning_nettrim.pruning.allocation.uniform import kept_in_total
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.session import CalibrationSession


@dataclass(frozen=True)
class EpsilonAllocation(Allocation):
    """In each layer as few weights as one local error, common to all layers, allows."""

    def allocate(self, session: CalibrationSession, sparsity: float) -> dict[str, Budget]:
        """The budget of every layer."""
        sizes = session.shared_sizes()
        curves = measure_curves(session, list(sizes))
        kept = balance(
            lambda t: {name: curve.fewest_within(math.exp(-t)) for name, curve in curves.items()},
            (-5.0, 25.0),
            kept_in_total(sizes, sparsity),
            session.kept_bounds(),
        )
        return session.budgets_keeping(kept)
