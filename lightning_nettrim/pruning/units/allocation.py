"""How many units of each group are kept within a budget, and the budgets of the layers that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.session import CalibrationSession
from lightning_nettrim.pruning.units.base import KeptUnits, MeasuredUnits
from lightning_nettrim.pruning.units.costs import UnitCosts
from lightning_nettrim.pruning.units.elimination import Elimination
from lightning_nettrim.pruning.units.graph import TRACED_INPUTS
from lightning_nettrim.pruning.units.groups import UnitGroup, find_groups, rows_of_channels
from lightning_nettrim.pruning.units.latency import keep_within_latency
from lightning_nettrim.runtime.sharded import is_sharded

STEPS = 64
"""A group is reduced in about so many steps."""

FEWER = 1, 2, 4, 8
"""Numbers of these steps that are compared, as the loss is not convex."""


def allocate_units(session: CalibrationSession, budget: tuple[str, float] | None) -> dict[str, Budget]:
    """The budget of every layer, with the inputs that it no longer reads.

    Args:
        session: the trained model with its calibration data.
        budget: what is limited (``units``, ``parameters``, ``macs`` or ``latency``), and to which fraction of the
            trained network's; ``None`` if the selection determines the numbers of units.

    Raises:
        ModuleNotFoundError: without the package torch-pruning.
        ValueError: if the network cannot be traced, if no group of units can be removed, or if the budget is smaller
            than the network with the fewest units.
    """
    session.restore()
    groups, batch = session_groups(session)
    costs = UnitCosts(session.model, batch, groups)
    measured = (session.config.select or Elimination()).measure(session, batch, groups)
    if budget is None:
        kept = measured.sizes()
    elif budget[0] == "latency":
        kept = _keep_within_latency(session, groups, costs, measured, budget[1])
    else:
        kept = keep_within(costs, measured.loss, budget, session.config.round_to)
    session.run.notes.append(_summary(costs, kept))
    return _budgets(session, groups, measured.select(kept))


def _keep_within_latency(
    session: CalibrationSession,
    groups: Mapping[str, UnitGroup],
    costs: UnitCosts,
    measured: MeasuredUnits,
    fraction: float,
) -> dict[str, int]:
    """Numbers of units within a fraction of the latency, distributed as within multiply-accumulates."""
    config = session.config

    def keep(macs: float) -> dict[str, int]:
        return keep_within(costs, measured.loss, ("macs", macs), config.round_to)

    fewest = _fewest(costs, config.round_to)
    left = costs.of(fewest, "macs") / costs.total("macs")
    return keep_within_latency(session, groups, keep, (fewest, left), (config.latency_batch_size, fraction))


def session_groups(session: CalibrationSession) -> tuple[dict[str, UnitGroup], CalibrationBatch]:
    """The groups of units of the session's model, and the batch on which it was traced.

    Raises:
        ModuleNotFoundError: without the package torch-pruning.
        ValueError: if the network cannot be traced, or if no group of units can be removed.
    """
    if is_sharded(session.model):
        raise ValueError(
            "pattern 'units': expected parameters that are not divided among processes, got FSDP2: use another strategy"
        )
    session.run.progress.activity = "tracing the dependencies of units"
    first = session.activations.calibration_set.without_cache()[:1]
    batch = first.divided(max(first.inputs // TRACED_INPUTS, 1))[0]
    with session.processes.raise_together():
        groups, skipped = find_groups(session.model, batch, session.plan.layers)
    common = set(groups).intersection(*session.processes.gather(list(groups)))
    skipped |= dict.fromkeys(set(groups) - common, "another process cannot remove them")
    groups = {name: group for name, group in groups.items() if name in common}
    if not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"pattern 'units': expected a group of units that can be removed, got none ({reasons}): choose another"
            " pattern"
        )
    for name, reason in skipped.items():
        session.run.notes.append(f"units of {name} are all kept: {reason}")
    return groups, batch


def _summary(costs: UnitCosts, kept: Mapping[str, int]) -> str:
    """The numbers of kept units and what is left of the network, for the report."""
    units = ", ".join(f"{name} {count} of {costs.sizes[name]}" for name, count in kept.items())
    left = {measure: costs.of(kept, measure) / costs.total(measure) for measure in ("macs", "parameters")}
    return (
        f"units kept: {units}; compacted, {left['macs']:.1%} of the multiply-accumulates and"
        f" {left['parameters']:.1%} of the parameters are left"
    )


def keep_within(
    costs: UnitCosts, loss: Callable[[str, int], float], budget: tuple[str, float], round_to: int
) -> dict[str, int]:
    """Numbers of units within a budget, by removing those first that change the output least per saved cost.

    Args:
        costs: of the network.
        loss: of a group with a number of units.
        budget: what is limited, and to which fraction of the trained network's.
        round_to: numbers are multiples of this, in groups that have as many.

    Raises:
        ValueError: if the network with the fewest units exceeds the budget.
    """
    measure, fraction = budget
    limit = fraction * costs.total(measure)
    choices = {name: _choices(size, round_to) for name, size in costs.sizes.items()}
    fewest = costs.of(_fewest(costs, round_to), measure)
    if fewest > limit:
        raise ValueError(
            f"{measure}: expected at least {fewest / costs.total(measure):.4f}, which is left with the fewest units,"
            f" got {fraction:g}: choose more, or ignore fewer layers"
        )
    losses = {name: {count: loss(name, count) for count in counts} for name, counts in choices.items()}
    kept = {name: counts[0] for name, counts in choices.items()}

    def priced(ahead: Sequence[int]) -> Iterator[tuple[float, str, int]]:
        """Further steps of each group: the change of the loss per change of the cost, the group, its new number."""
        for name, counts in choices.items():
            for steps in ahead:
                if 0 <= (index := counts.index(kept[name]) + steps) < len(counts):
                    change = losses[name][counts[index]] - losses[name][kept[name]]
                    yield change / costs.saving(name, kept, counts[index], measure), name, counts[index]

    while costs.of(kept, measure) > limit:
        _, name, kept[name] = min(priced(FEWER))
    while within := [step for step in priced((-1,)) if costs.of({**kept, step[1]: step[2]}, measure) <= limit]:
        _, name, kept[name] = max(within)
    return kept


def _fewest(costs: UnitCosts, round_to: int) -> dict[str, int]:
    """The smallest numbers of units."""
    return {name: _choices(size, round_to)[-1] for name, size in costs.sizes.items()}


def _choices(size: int, round_to: int) -> list[int]:
    """Numbers of units that a group may keep, descending."""
    step = max(size // STEPS, 1)
    if size >= round_to > 1:
        step = round_to * max(step // round_to, 1)
        return [size, *range((size - 1) // round_to * round_to, 0, -step)]
    return [size, *range(size - step, 0, -step)]


def _budgets(
    session: CalibrationSession, groups: Mapping[str, UnitGroup], selected: Mapping[str, KeptUnits]
) -> dict[str, Budget]:
    """The budget of every layer of the plan, in which the inputs of removed units are removed."""
    removed: dict[str, set[int]] = {name: set() for name in session.plan.layers}
    scales: dict[str, Tensor] = {}
    synthetic: dict[str, dict[str, float]] = {name: {} for name in session.plan.layers}
    for group_name, group in groups.items():
        units = selected[group_name]
        for name, channels in group.readers.items():
            layer = session.plan.layers[name]
            removed[name].update(rows_of_channels(layer, channels[~units.mask]).flatten().tolist())
            synthetic[name] |= units.synthetic
            if units.scales is not None:
                own = scales.setdefault(name, torch.ones(layer.inputs, dtype=torch.float64))
                rows = rows_of_channels(layer, channels)
                own[rows] = units.scales.unsqueeze(-1).expand_as(rows)
    return {
        name: replace(
            budget,
            sparsity=len(removed[name]) / session.plan.layers[name].inputs,
            removed_inputs=tuple(sorted(removed[name])),
            input_scales=tuple(scales[name].tolist()) if name in scales else (),
            synthetic_inputs=synthetic[name],
        )
        for name, budget in session.plan.budgets.items()
    }
