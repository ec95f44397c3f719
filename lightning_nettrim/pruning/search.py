"""The sparsest network whose metric stays within a drop, by trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from lightning_nettrim.pruning.allocation.named import allocate
from lightning_nettrim.pruning.plan import zero_budgets
from lightning_nettrim.pruning.plan_file import plan_to_yaml
from lightning_nettrim.pruning.pruner import prune_network
from lightning_nettrim.pruning.results import LayerReport, PruningResult, Trial
from lightning_nettrim.pruning.session import CalibrationSession

MIN_DENSITY, MAX_DENSITY = 0.002, 0.5
"""Range of the search, if the bounds of the layers allow it."""


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
    sizes, bounds = session.shared_sizes(), session.kept_bounds()
    if not sizes:
        raise ValueError("max_drop: expected a layer without a budget of its own, got none: remove some budgets")
    dense = mean(metric())
    max_drop = float(config.max_drop or 0) * (abs(dense) if config.relative else 1.0)
    tolerance = max_drop + 1e-9 * max(abs(dense), 1.0)
    best: tuple[float, PruningResult, dict[str, Tensor]] | None = None

    def is_within(value: float) -> bool:
        return value >= dense - tolerance if config.mode == "max" else value <= dense + tolerance

    def evaluate(sparsity: float) -> float:
        nonlocal best, session
        budgets = allocate(session, sparsity)
        result, session = prune_network(session, budgets, label=f"{sparsity:.4f}@")
        value = mean(metric())
        if is_within(value) and (best is None or sparsity > best[0]):
            best = sparsity, replace(result, plan=plan_to_yaml(session.plan, budgets)), session.snapshot()
        if on_trial is not None:
            on_trial(Trial(sparsity, value, is_within(value)))
        return value

    least, most = (sum(bound[i] for bound in bounds.values()) / sum(sizes.values()) for i in (0, 1))
    trials = search_sparsity(evaluate, is_within, limits=(max(least, MIN_DENSITY), min(most, MAX_DENSITY)))
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
    evaluate: Callable[[float], float],
    is_within: Callable[[float], bool],
    *,
    first: float = 0.1,
    limits: tuple[float, float] = (MIN_DENSITY, MAX_DENSITY),
    max_trials: int = 9,
) -> list[Trial]:
    """Bisect the logarithm of the density.

    The first density is halved, or doubled, until a trial is on the other side of the drop; then the interval is
    bisected until its ends differ by less than 4 %.

    Args:
        evaluate: prunes to a sparsity and returns the metric.
        is_within: whether a metric is within the drop.
        first: density of the first trial.
        limits: densities between which is searched.
        max_trials: maximum number of trials.

    Returns:
        All trials in order; the result is the sparsest one within the drop, if any.
    """
    trials: list[Trial] = []
    density, good, bad = min(max(first, limits[0]), limits[1]), None, None
    while len(trials) < max_trials:
        metric = evaluate(1 - density)
        trials.append(Trial(1 - density, metric, is_within(metric)))
        good, bad = (density, bad) if trials[-1].within else (good, density)
        if good is None:
            if density >= limits[1]:
                break
            density = min(2 * density, limits[1])
        elif bad is None:
            if density <= limits[0]:
                break
            density = max(density / 2, limits[0])
        elif good / bad < 1.04:
            break
        else:
            density = (good * bad) ** 0.5
    return trials
