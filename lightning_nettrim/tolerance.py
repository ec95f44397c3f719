"""Tolerance: the sparsest network whose monitored metric stays within a drop, by trials."""

from __future__ import annotations

from collections.abc import Callable

from lightning_nettrim.report import Trial

SPARSEST, DENSEST = 0.002, 0.5
"""Densities between which is searched, if bounds leave it free."""


def sparsest(
    evaluate: Callable[[float], float],
    allowed: Callable[[float], bool],
    *,
    first: float = 0.1,
    ends: tuple[float, float] = (SPARSEST, DENSEST),
    most: int = 9,
) -> list[Trial]:
    """Bisect the logarithm of the density.

    From the first density it is halved, or doubled, until a trial lies on the other side of what is allowed; then
    bisected until both ends are within four hundredths of each other.

    Args:
        evaluate: prune to this sparsity and return the metric.
        allowed: whether a metric is within the drop.
        first: density of the first trial.
        ends: densities between which is searched.
        most: trials at most.

    Returns:
        All trials in order; the sparsest one that is within is the answer, and there may be none.
    """
    trials: list[Trial] = []
    density, good, bad = min(max(first, ends[0]), ends[1]), None, None
    while len(trials) < most:
        metric = evaluate(1 - density)
        trials.append(Trial(1 - density, metric, allowed(metric)))
        good, bad = (density, bad) if trials[-1].within else (good, density)
        if good is None:
            if density >= ends[1]:
                break
            density = min(2 * density, ends[1])
        elif bad is None:
            if density <= ends[0]:
                break
            density = max(density / 2, ends[0])
        elif good / bad < 1.04:
            break
        else:
            density = (good * bad) ** 0.5
    return trials
