"""The sparsest network whose metric stays within a drop, by trials."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from lightning_nettrim.pruning.allocation.named import allocate
from lightning_nettrim.pruning.plan import zero_budgets
from lightning_nettrim.pruning.plan_file import plan_to_yaml
from lightning_nettrim.pruning.pruner import prune_network
from lightning_nettrim.pruning.results import LayerReport, PruningResult, Trial
from lightning_nettrim.pruning.session import CalibrationSession

MIN_DENSITY, MAX_DENSITY, FIRST_DENSITY = 0.002, 0.5, 0.1
"""Range of the search, if the bounds of the layers allow it, and the density of its first trial."""

UNIT_DENSITIES = 0.05, 0.95
"""Range of the search for whole units, which starts in its middle."""

SUFFICIENT, MAX_USED = 0.9, 16.0
"""Fraction of the drop that is worth no further trial, and the largest one, or inverse of one, that is told apart."""


def prune_within_drop(
    session: CalibrationSession,
    metric: Callable[[], float],
    on_layer: Callable[[LayerReport], None] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> PruningResult:
    """Prune the model in place to the highest sparsity within the drop; it stays dense if there is none.

    Args:
        session: the trained model with its calibration data.
        metric: of the model as it is when called; averaged over processes.
        on_layer: called with the report of each layer of the result.
        on_trial: called after each trial.

    Raises:
        ValueError: if every layer has a budget of its own.
    """
    config, mean = session.config, session.processes.mean
    units = config.budget.pattern.selects_units
    sizes, bounds = session.shared_sizes(), session.kept_bounds()
    if not sizes:
        raise ValueError("max_drop: expected a layer without a budget of its own, got none: remove some budgets")
    dense = mean(metric())
    max_drop = float(config.max_drop or 0) * (abs(dense) if config.relative else 1.0)
    tolerance = max_drop + 1e-9 * max(abs(dense), 1.0)
    best: tuple[float, PruningResult, dict[str, Tensor]] | None = None

    def used(value: float) -> float:
        """The fraction of the drop that a metric has used; it is within the drop up to 1."""
        return (dense - value if config.mode == "max" else value - dense) / tolerance

    def evaluate(sparsity: float) -> Trial:
        nonlocal best, session
        count = len(session.run.notes)
        budgets = allocate(session, sparsity)
        own = session.run.notes[count:]  # of this trial
        del session.run.notes[count:]
        result, session = prune_network(session, budgets, label=f"{sparsity:.4f}@")
        result = replace(result, notes=(*result.notes, *own))
        value = mean(metric())
        trial = Trial(sparsity, value, used(value) <= 1)
        if trial.within and (best is None or sparsity > best[0]):
            best = sparsity, replace(result, plan=plan_to_yaml(session.plan, budgets)), session.snapshot()
        if on_trial is not None:
            on_trial(trial)
        return trial

    least, most = (sum(bound[i] for bound in bounds.values()) / sum(sizes.values()) for i in (0, 1))
    limits = UNIT_DENSITIES if units else (max(least, MIN_DENSITY), min(most, MAX_DENSITY))
    trials = search_sparsity(evaluate, used, first=limits[1] / 2 if units else FIRST_DENSITY, limits=limits)
    if best is None:
        result, session = prune_network(session, zero_budgets(session.plan))
    else:
        result = best[1]
        session.restore(best[2])
    if on_layer is not None:
        for report in result.reports:
            on_layer(report)
    return replace(result, trials=(Trial(0.0, dense, True), *trials))


def search_sparsity(
    evaluate: Callable[[float], Trial],
    used: Callable[[float], float],
    *,
    first: float = FIRST_DENSITY,
    limits: tuple[float, float] = (MIN_DENSITY, MAX_DENSITY),
    max_trials: int = 9,
) -> list[Trial]:
    """Search the density at which the drop is used up, whose logarithm depends smoothly on that of the drop.

    As long as all trials are on one side of it, the drop is assumed to grow with the inverse square of the density.
    Then it is interpolated between the sparsest trial within the drop and the densest one that is not. The search ends
    when a trial is within the drop and uses nine tenths of it, or when the densities of both differ by less than 4 %.

    Args:
        evaluate: prunes to a sparsity and measures the metric.
        used: the fraction of the drop that a metric has used; at most 1 is within the drop.
        first: density of the first trial.
        limits: densities between which is searched.
        max_trials: maximum number of trials.

    Returns:
        All trials in order; the result is the sparsest one within the drop, if any.
    """
    trials: list[Trial] = []
    density = min(max(first, limits[0]), limits[1])
    good: tuple[float, float] | None = None  # density and used drop of the sparsest trial within the drop
    bad: tuple[float, float] | None = None
    while len(trials) < max_trials:
        trials.append(evaluate(1 - density))
        fraction = used(trials[-1].metric)
        point = density, min(max(fraction, 1 / MAX_USED), MAX_USED) if math.isfinite(fraction) else MAX_USED
        good, bad = (point, bad) if trials[-1].within else (good, point)
        if trials[-1].within and point[1] >= SUFFICIENT:
            break
        if good is None or bad is None:
            if density == limits[good is None]:
                break
            change = min(max(point[1] ** 0.5, 0.25), 4.0)
            change = max(change, 1.25) if good is None else min(change, 0.8)
            density = min(max(change * density, limits[0]), limits[1])
        elif good[0] / bad[0] < 1.04:
            break
        else:
            part = math.log(1 / good[1]) / math.log(bad[1] / good[1])
            density = good[0] * (bad[0] / good[0]) ** min(max(part, 0.1), 0.9)
    return trials
