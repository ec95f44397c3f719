"""Numbers of kept weights that are within the limits of each layer and have an exact total."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Bounds = Mapping[str, tuple[int, int]]
"""How many weights of each layer may be kept, at least and at most."""


def check_total(total: int, bounds: Bounds) -> None:
    """Check that there are counts within their bounds with a total.

    Raises:
        ValueError: if there are none.
    """
    least, most = (sum(bound[i] for bound in bounds.values()) for i in (0, 1))
    if not least <= total <= most:
        raise ValueError(
            f"expected between {least} and {most} weights to be kept within min_sparsity and max_sparsity, got {total}:"
            " change the sparsity or the bounds"
        )


def balance(
    choose: Callable[[float], Mapping[str, float]], limits: tuple[float, float], total: int, bounds: Bounds
) -> dict[str, int]:
    """Counts within their bounds with an exact total, by bisection of a parameter that all counts increase with.

    Args:
        choose: the counts at a value of the parameter.
        limits: values between which the parameter is searched.
        total: sum of the counts.
        bounds: of each count.

    Raises:
        ValueError: if the bounds allow no such counts.
    """
    check_total(total, bounds)

    def clipped(t: float) -> dict[str, int]:
        return {name: min(max(round(count), bounds[name][0]), bounds[name][1]) for name, count in choose(t).items()}

    low, high = limits
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle).values()) <= total else (low, middle)
    counts, above = clipped(low), clipped(high)
    missing = total - sum(counts.values())
    by_slack = sorted(
        counts, key=lambda name: (above[name] - counts[name], bounds[name][1] - counts[name]), reverse=True
    )
    for limit in (above, {name: bound[1] for name, bound in bounds.items()}, {n: b[0] for n, b in bounds.items()}):
        for name in by_slack:
            slack = limit[name] - counts[name]
            change = max(min(missing, slack), 0) if missing > 0 else min(max(missing, slack), 0)
            counts[name], missing = counts[name] + change, missing - change
    return counts
