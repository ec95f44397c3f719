"""Zeros where the smallest weights of all layers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nettrim.pruning.allocation.balancing import Bounds, balance
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.allocation.uniform import kept_in_total
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.session import CalibrationSession


@dataclass(frozen=True)
class MagnitudeAllocation(Allocation):
    """As many weights of each layer as it has among the largest |W| of all layers together."""

    def allocate(self, session: CalibrationSession, sparsity: float) -> dict[str, Budget]:
        """The budget of every layer."""
        sizes, weights = session.shared_sizes(), session.weights()
        total = kept_in_total(sizes, sparsity)
        kept = kept_by_magnitude({name: weights[name] for name in sizes}, total, session.kept_bounds())
        return session.budgets_keeping(kept)


def kept_by_magnitude(weights: Mapping[str, Tensor], total: int, bounds: Bounds) -> dict[str, int]:
    """Weights kept of each layer: those among the largest |W| of all layers together."""
    magnitudes = {name: weight.abs().flatten() for name, weight in weights.items()}
    order = torch.cat(list(magnitudes.values())).sort(descending=True).values

    def choose(t: float) -> dict[str, float]:
        threshold = order[min(int(t), len(order) - 1)]
        return {name: float((magnitude >= threshold).sum()) for name, magnitude in magnitudes.items()}

    return balance(choose, (0.0, float(len(order))), total, bounds)
