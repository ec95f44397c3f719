"""Allocation: exact totals, bounds, and the optimum each way promises."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lightning_nettrim.pruning.allocation import Curve, by_magnitude, common_error, marginal_error, uniform

SIZES = {"a": 1000, "b": 300, "c": 77}
FREE = {name: (0, size) for name, size in SIZES.items()}


def curve(size, scale):
    kept = (size // 50, size // 10, size // 3, size)
    return Curve(kept, *([tuple(scale * (1 - k / size) ** 2 for k in kept)] * 2))


CURVES = {"a": curve(1000, 0.3), "b": curve(300, 1.0), "c": curve(77, 2.0)}
WAYS = {
    "uniform": lambda total, bounds: uniform(SIZES, total, bounds),
    "epsilon": lambda total, bounds: common_error(CURVES, total, bounds),
    "global": lambda total, bounds: marginal_error(CURVES, total, bounds),
    "tilted": lambda total, bounds: marginal_error(CURVES, total, bounds, 1.0),
    "magnitude": lambda total, bounds: by_magnitude(
        {name: torch.randn(size, generator=torch.Generator().manual_seed(size)) for name, size in SIZES.items()},
        total,
        bounds,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("total", [0, 1, 27, 138, 689, 1376, 1377])
def test_totals_are_exact_and_bounds_hold(way, total):
    kept = WAYS[way](total, FREE)
    assert sum(kept.values()) == total
    assert all(0 <= kept[name] <= SIZES[name] for name in SIZES)
    bounds = {"a": (100, 500), "b": (10, 300), "c": (70, 77)}
    if 180 <= total <= 877:
        kept = WAYS[way](total, bounds)
        assert sum(kept.values()) == total
        assert all(low <= kept[name] <= high for name, (low, high) in bounds.items())
    else:
        with pytest.raises(ValueError, match=f"expected between 180 and 877 weights .* got {total}"):
            WAYS[way](total, bounds)


def test_uniform_is_uniform():
    assert uniform(SIZES, 138, FREE) == {"a": 100, "b": 30, "c": 8}


def test_by_magnitude_keeps_the_largest_of_all():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}
    threshold = torch.cat([w.abs() for w in weights.values()]).sort(descending=True).values[199]
    assert by_magnitude(weights, 200, FREE) == {name: int((w.abs() >= threshold).sum()) for name, w in weights.items()}


def test_common_error_gives_every_layer_the_same_error():
    points = (50, 100, 200, 400, 800)
    curves = {
        name: Curve(points, *([(*(scale * (k / 50) ** -power for k in points[:-1]), 0.0)] * 2))
        for name, scale, power in (("a", 1.0, 1.0), ("b", 0.4, 0.5), ("c", 0.7, 2.0))
    }
    kept = common_error(curves, 500, dict.fromkeys(curves, (50, 400)))
    errors = [1.0 * (kept["a"] / 50) ** -1.0, 0.4 * (kept["b"] / 50) ** -0.5, 0.7 * (kept["c"] / 50) ** -2.0]
    assert max(errors) <= 1.03 * min(errors)


def test_marginal_error_is_the_least_sum_of_squares():
    points = (4, 8, 16, 32, 64)
    curves = {n: Curve(points, *([tuple(s * 2.0 ** -(k / r) for k in points[:-1]) + (0.0,)] * 2))
              for n, s, r in (("a", 1.0, 6.0), ("b", 0.6, 9.0))}  # fmt: skip
    bounds = {"a": (4, 64), "b": (4, 64)}
    kept = marginal_error(curves, 48, bounds)

    def cost(a):
        total = 0.0
        for name, k in (("a", a), ("b", 48 - a)):
            i = next(i for i in range(4) if points[i] <= k <= points[i + 1])
            few, many = (max(curves[name].effects[j], 1e-6) for j in (i, i + 1))
            part = torch.tensor(k / points[i]).log() / torch.tensor(points[i + 1] / points[i]).log()
            total += (few * (many / few) ** float(part)) ** 2
        return total

    best = min(range(4, 45), key=cost)
    assert cost(kept["a"]) <= 1.05 * cost(best)


def test_the_tilt_moves_weights_to_later_layers():
    for total, (first, last) in product((200, 500), [("a", "c")]):
        flat, tilted = marginal_error(CURVES, total, FREE), marginal_error(CURVES, total, FREE, 2.0)
        assert tilted[first] < flat[first]
        assert tilted[last] >= flat[last]
