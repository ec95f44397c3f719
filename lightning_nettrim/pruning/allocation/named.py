"""Allocations by name."""

from __future__ import annotations

from lightning_nettrim.pruning.allocation.balancing import check_total
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.allocation.epsilon import EpsilonAllocation
from lightning_nettrim.pruning.allocation.magnitude import MagnitudeAllocation
from lightning_nettrim.pruning.allocation.network_error import GlobalAllocation
from lightning_nettrim.pruning.allocation.uniform import UniformAllocation, kept_in_total
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.session import CalibrationSession
from lightning_nettrim.pruning.units.allocation import allocate_units

_NAMED: dict[str, Allocation] = {
    "uniform": UniformAllocation(),
    "epsilon": EpsilonAllocation(),
    "global": GlobalAllocation(),
    "magnitude": MagnitudeAllocation(),
}


def allocate(session: CalibrationSession, sparsity: float | None) -> dict[str, Budget]:
    """The budget of every layer by the allocation of the options; the plan's without one.

    Args:
        session: the trained model with its calibration data.
        sparsity: of the layers that share it or, with the pattern ``units``, of the units; ``None`` is the budget of
            the options.

    Raises:
        ValueError: if the limits of the layers leave no such budgets, before anything is measured.
    """
    config = session.config
    if config.budget.pattern.selects_units:
        return allocate_units(session, config.unit_budget if sparsity is None else ("units", 1 - sparsity))
    sizes = session.shared_sizes()
    if sparsity is None or not sizes:
        return session.plan.budgets
    check_total(kept_in_total(sizes, sparsity), session.kept_bounds())
    allocation = config.allocate
    allocation = _NAMED[allocation] if isinstance(allocation, str) else allocation
    return allocation.allocate(session, sparsity)
