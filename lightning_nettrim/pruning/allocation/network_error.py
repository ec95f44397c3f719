"""Zeros where they change the network's output least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lightning_nettrim.pruning.allocation.balancing import Bounds, balance, geometric_mean
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.allocation.curves import QUICK, ErrorCurve, measure_curves
from lightning_nettrim.pruning.allocation.magnitude import kept_by_magnitude
from lightning_nettrim.pruning.allocation.uniform import kept_in_total
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.pruner import prune_network
from lightning_nettrim.pruning.session import CalibrationSession, retried, subset, with_fewer_rows
from lightning_nettrim.runtime.fingerprint import fingerprint


@dataclass(frozen=True)
class GlobalAllocation(Allocation):
    """The best of three allocations by the change of the network's output, measured on part of the inputs.

    The three are: by the effect of each layer alone on the output; by magnitude; the geometric mean of both. The first
    is wrong about layers of a residual block that can each be pruned, but not together.

    Args:
        inputs: number of inputs, approximately, on which the allocations are compared.
        compensation: in a cascade, later layers compensate for the errors of earlier ones, so that an early error
            counts less: its effect is multiplied by a factor that grows geometrically over the layers to
            exp(compensation) at the last. The default was measured on LeNet-300-100 at 95, 97 and 98 % zeros.
    """

    inputs: int = 2048
    compensation: float = 1.0

    def allocate(self, session: CalibrationSession, sparsity: float) -> dict[str, Budget]:
        """The budget of every layer."""
        sizes, bounds = session.shared_sizes(), session.kept_bounds()
        candidates = self._candidates(session, kept_in_total(sizes, sparsity), bounds)
        return min(
            map(session.budgets_keeping, candidates), key=lambda budgets: self._output_distance(session, budgets)
        )

    def _candidates(self, session: CalibrationSession, total: int, bounds: Bounds) -> Iterator[dict[str, int]]:
        names, weights = list(bounds), session.weights()
        compensation = self.compensation if session.config.scheme == "cascade" else 0.0
        by_effect = kept_by_output_error(measure_curves(session, names), total, bounds, compensation)
        by_magnitude = kept_by_magnitude({name: weights[name] for name in names}, total, bounds)
        yield by_effect
        yield by_magnitude
        yield geometric_mean(by_effect, by_magnitude, total, bounds)

    def _output_distance(self, session: CalibrationSession, budgets: dict[str, Budget]) -> float:
        """The change of the network's output at these budgets, by quick solves on part of the inputs."""
        text = repr(sorted(budgets.items()))

        def measure() -> float:
            distance, _ = retried(session, lambda s: self._rehearse(s, budgets), with_fewer_rows)
            return distance

        name = f"rehearsal-{fingerprint(text)[:8]}"
        return session.run.cached(name, fingerprint(session.fingerprint, text, self.inputs), measure)

    def _rehearse(self, session: CalibrationSession, budgets: dict[str, Budget]) -> float:
        """Prune part of the inputs; the model has its trained weights afterwards."""
        session.run.progress.activity = "comparing allocations"
        session.run.progress.report("comparing allocations", 0.0)
        key = f"rehearsal on {self.inputs} inputs"
        cache = session.run.cache
        smaller = cache[key] if key in cache else subset(session, self.inputs, QUICK)
        try:
            result, cache[key] = prune_network(smaller, budgets)
        finally:
            session.restore()
        return result.output_distance


def kept_by_output_error(
    curves: Mapping[str, ErrorCurve], total: int, bounds: Bounds, compensation: float = 0.0
) -> dict[str, int]:
    """Weights kept of each layer such that the last one kept of each reduces Σ (output error)² by the same amount.

    This minimizes the sum.
    """
    grids = {}
    for i, (name, curve) in enumerate(curves.items()):
        factor = math.exp(compensation / 2 * i / max(len(curves) - 1, 1))
        grids[name] = replace(curve, output_errors=tuple(factor * error for error in curve.output_errors)).on_grid()

    def choose(t: float) -> dict[str, float]:
        price = math.exp(-t)
        return {
            name: min(zip(kept, errors, strict=True), key=lambda point: point[1] ** 2 + price * point[0])[0]
            for name, (kept, errors) in grids.items()
        }

    return balance(choose, (-5.0, 80.0), total, bounds)
