"""Allocate: how a number of zeros is spread over layers, exactly in total and within each layer's bounds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Bounds = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Curve:
    """What it costs to keep few weights of one layer, all others as trained.

    Attributes:
        kept: weights kept, ascending; the last is all of them.
        errors: of the layer's own response, relative, at each.
        effects: on the last layer's response, relative, at each.
    """

    kept: tuple[int, ...]
    errors: tuple[float, ...]
    effects: tuple[float, ...]


def uniform(sizes: Mapping[str, int], total: int, bounds: Bounds) -> dict[str, int]:
    """Weights kept of each layer: the same fraction of all."""
    return _balanced(lambda t: {name: t * size for name, size in sizes.items()}, (0.0, 1.0), total, bounds)


def common_error(curves: Mapping[str, Curve], total: int, bounds: Bounds) -> dict[str, int]:
    """Weights kept of each layer: as few as one relative error, common to all layers, allows (Net-Trim's own way)."""

    def at(t: float) -> dict[str, float]:
        return {name: _fewest(curve.kept, curve.errors, math.exp(-t)) for name, curve in curves.items()}

    return _balanced(at, (-5.0, 25.0), total, bounds)


def marginal_error(curves: Mapping[str, Curve], total: int, bounds: Bounds, tilt: float = 0.0) -> dict[str, int]:
    """Weights kept of each layer: the last one kept of each lowers Σ effect² by as much, which makes the sum least.

    Where later layers make up for the ones before them, an early error counts less than its effect alone: by a factor
    that grows geometrically over the layers to e^tilt at the last.
    """
    grids = {}
    for i, (name, curve) in enumerate(curves.items()):
        factor = math.exp(tilt / 2 * i / max(len(curves) - 1, 1))
        grids[name] = _grid(replace(curve, effects=tuple(factor * effect for effect in curve.effects)))

    def at(t: float) -> dict[str, float]:
        price = math.exp(-t)
        return {
            name: min(zip(kept, effects, strict=True), key=lambda point: point[1] ** 2 + price * point[0])[0]
            for name, (kept, effects) in grids.items()
        }

    return _balanced(at, (-5.0, 80.0), total, bounds)


def by_magnitude(weights: Mapping[str, Tensor], total: int, bounds: Bounds) -> dict[str, int]:
    """Weights kept of each layer: those among the largest |W| of all layers together."""
    sizes = {name: weight.abs().flatten() for name, weight in weights.items()}
    order = torch.cat(list(sizes.values())).sort(descending=True).values

    def at(t: float) -> dict[str, float]:
        threshold = order[min(int(t), len(order) - 1)]
        return {name: float((size >= threshold).sum()) for name, size in sizes.items()}

    return _balanced(at, (0.0, float(len(order))), total, bounds)


def halfway(one: Mapping[str, int], other: Mapping[str, int], total: int, bounds: Bounds) -> dict[str, int]:
    """Weights kept of each layer: in proportion to the geometric mean of two allocations."""
    middle = {name: math.sqrt(max(one[name], 1) * max(other[name], 1)) for name in one}
    return _balanced(
        lambda t: {name: math.exp(t) * size for name, size in middle.items()}, (-20.0, 20.0), total, bounds
    )


def _balanced(
    choose: Callable[[float], Mapping[str, float]], limits: tuple[float, float], total: int, bounds: Bounds
) -> dict[str, int]:
    """Counts within their bounds that sum to the total, by bisection of a number that they all grow with.

    Raises:
        ValueError: if the bounds leave no such counts.
    """
    least, most = (sum(bound[i] for bound in bounds.values()) for i in (0, 1))
    if not least <= total <= most:
        raise ValueError(
            f"expected between {least} and {most} weights to be kept within min_sparsity and max_sparsity, got {total}:"
            " change the sparsity or the bounds"
        )

    def clipped(t: float) -> dict[str, int]:
        return {name: min(max(round(count), bounds[name][0]), bounds[name][1]) for name, count in choose(t).items()}

    low, high = limits
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle).values()) <= total else (low, middle)
    counts, above = clipped(low), clipped(high)
    missing = total - sum(counts.values())
    by_room = sorted(
        counts, key=lambda name: (above[name] - counts[name], bounds[name][1] - counts[name]), reverse=True
    )
    for limit in (above, {name: bound[1] for name, bound in bounds.items()}, {n: b[0] for n, b in bounds.items()}):
        for name in by_room:
            room = limit[name] - counts[name]
            step = max(min(missing, room), 0) if missing > 0 else min(max(missing, room), 0)
            counts[name], missing = counts[name] + step, missing - step
    return counts


def _fewest(kept: tuple[int, ...], errors: tuple[float, ...], allowed: float) -> float:
    """The fewest weights at which the error is at most so large, log-linear between the points of its curve."""
    for few, many, more, less in zip(kept, kept[1:], errors, errors[1:], strict=False):
        if less <= allowed:
            if more <= allowed:
                return few
            if less <= 0:
                return many
            return few * (many / few) ** (math.log(more / allowed) / math.log(more / less))
    return kept[-1]


def _grid(curve: Curve, points: int = 256) -> tuple[list[float], list[float]]:
    """The curve of effects on a fine grid, log-linear between its points."""
    low, high = math.log(curve.kept[0]), math.log(curve.kept[-1])
    kept = [math.exp(low + (high - low) * i / (points - 1)) for i in range(points)]
    floor = 1e-6
    effects = []
    for k in kept:
        i = min(max(bisect_left(curve.kept, k), 1), len(curve.kept) - 1)
        few, many = curve.kept[i - 1], curve.kept[i]
        more, less = max(curve.effects[i - 1], floor), max(curve.effects[i], floor)
        part = math.log(k / few) / math.log(many / few)
        effects.append(more * (less / more) ** part)
    return kept, effects
