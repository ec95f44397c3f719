"""Zeros where they change the network's output least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_nettrim.pruning.allocation.balancing import Bounds, balance
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.allocation.curves import ErrorCurve, measure_layers
from lightning_nettrim.pruning.allocation.effects import measure_effects
from lightning_nettrim.pruning.allocation.uniform import kept_in_total
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.session import CalibrationSession


@dataclass(frozen=True)
class GlobalAllocation(Allocation):
    """The least change of the network's output, as the sum of what each layer contributes to it.

    The contribution of a layer is its effect on the output, measured once, times its squared local error, which is
    known as a function of the number of kept weights (`ErrorCurve`).

    Args:
        compensation: in a cascade, later layers compensate for the errors of earlier ones, so that an early error
            counts less: its effect is multiplied by a factor that grows geometrically over the layers to
            exp(compensation) at the last.
    """

    compensation: float = 1.0

    def allocate(self, session: CalibrationSession, sparsity: float) -> dict[str, Budget]:
        """The budget of every layer."""
        sizes = session.shared_sizes()
        session.restore()
        layers = dict(measure_layers(session, list(sizes)))
        curves, effects = {name: layer.curve for name, layer in layers.items()}, measure_effects(session, layers)
        if session.config.scheme == "cascade":
            effects = with_compensation(effects, self.compensation)
        kept = kept_by_effect(curves, effects, kept_in_total(sizes, sparsity), session.kept_bounds())
        return session.budgets_keeping(kept)


def with_compensation(effects: Mapping[str, float], compensation: float) -> dict[str, float]:
    """Effects of layers in order of execution, each times a factor that grows to exp(compensation) at the last."""
    last = max(len(effects) - 1, 1)
    return {name: effect * math.exp(compensation * i / last) for i, (name, effect) in enumerate(effects.items())}


def kept_by_effect(
    curves: Mapping[str, ErrorCurve], effects: Mapping[str, float], total: int, bounds: Bounds
) -> dict[str, int]:
    """Weights kept of each layer such that the last one kept of each reduces Σ effect·error² by the same amount.

    This minimizes the sum.
    """
    grids = {name: curve.on_grid() for name, curve in curves.items()}

    def choose(t: float) -> dict[str, float]:
        price = math.exp(-t)
        return {
            name: min(
                zip(kept, errors, strict=True), key=lambda point: effects[name] * point[1] ** 2 + price * point[0]
            )[0]
            for name, (kept, errors) in grids.items()
        }

    return balance(choose, (-5.0, 80.0), total, bounds)
