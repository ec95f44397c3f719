"""Allocations: exact totals, the limits of each layer, and what each of them optimizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from networks import copied_state, equal_states, mlp_batches, wide_mlp
from torch import nn

from lightning_nettrim import (
    Allocation,
    Budget,
    CalibrationSource,
    EpsilonAllocation,
    GlobalAllocation,
    MagnitudeAllocation,
    PruningConfig,
    UniformAllocation,
    trim,
)
from lightning_nettrim.pruning.allocation.balancing import balance
from lightning_nettrim.pruning.allocation.curves import DENSITIES, ErrorCurve, measure_curves, reference_density
from lightning_nettrim.pruning.allocation.magnitude import kept_by_magnitude
from lightning_nettrim.pruning.allocation.named import allocate
from lightning_nettrim.pruning.allocation.network_error import kept_by_effect
from lightning_nettrim.pruning.session_setup import calibrate
from lightning_nettrim.pruning.solving import solve_weighted

SIZES = {"a": 1000, "b": 300, "c": 77}
FREE = {name: (0, size) for name, size in SIZES.items()}


EQUAL = dict.fromkeys(SIZES, 1.0)


def curve(kept, errors):
    return ErrorCurve(tuple(kept), tuple(errors))


def quadratic(size, scale):
    kept = (size // 50, size // 10, size // 3, size)
    return curve(kept, [scale * (1 - k / size) ** 2 for k in kept])


CURVES = {"a": quadratic(1000, 0.3), "b": quadratic(300, 1.0), "c": quadratic(77, 2.0)}


class KnownSession:
    """A session with given sizes, limits and weights; its budgets are the numbers of kept weights themselves."""

    def __init__(self, bounds, sizes=SIZES):
        self._bounds, self._sizes = bounds, sizes

    def shared_sizes(self):
        return self._sizes

    def kept_bounds(self):
        return self._bounds

    def weights(self):
        return {
            name: torch.randn(1, size, 1, generator=torch.Generator().manual_seed(size))
            for name, size in self._sizes.items()
        }

    def budgets_keeping(self, kept):
        return dict(kept)

    def allocate(self, allocation, total):
        return allocation.allocate(self, 1 - total / sum(self._sizes.values()))


WAYS = {
    "uniform": lambda total, bounds: KnownSession(bounds).allocate(UniformAllocation(), total),
    "epsilon": lambda total, bounds: KnownSession(bounds).allocate(EpsilonAllocation(), total),
    "magnitude": lambda total, bounds: KnownSession(bounds).allocate(MagnitudeAllocation(), total),
    "effect": lambda total, bounds: kept_by_effect(CURVES, {"a": 1.0, "b": 1e-3, "c": 7.0}, total, bounds),
}


@pytest.fixture
def known_curves(monkeypatch):
    """A function that sets the curves that allocations measure."""

    def set_curves(curves):
        def measured(session, names):
            return {name: curves[name] for name in names}

        monkeypatch.setattr("lightning_nettrim.pruning.allocation.epsilon.measure_curves", measured)

    set_curves(CURVES)
    return set_curves


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("total", [0, 1, 27, 138, 689, 1376, 1377])
def test_totals_are_exact_and_limits_are_respected(way, total, known_curves):
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


def test_balancing_finds_the_parameter():
    bounds = {"a": (0, 100), "b": (0, 100)}
    assert balance(lambda t: {"a": t, "b": 3 * t}, (0.0, 100.0), 40, bounds) == {"a": 10, "b": 30}
    assert balance(lambda t: {"a": t, "b": 3 * t}, (0.0, 100.0), 160, bounds) == {"a": 60, "b": 100}


def test_uniform_keeps_the_same_fraction_of_each_layer():
    assert KnownSession(FREE).allocate(UniformAllocation(), 138) == {"a": 100, "b": 30, "c": 8}


def test_by_magnitude_the_largest_weights_of_all_layers_are_kept():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}
    threshold = torch.cat([w.abs() for w in weights.values()]).sort(descending=True).values[199]
    expected = {name: int((w.abs() >= threshold).sum()) for name, w in weights.items()}
    assert kept_by_magnitude(weights, 200, FREE) == expected


def test_epsilon_gives_every_layer_the_same_local_error(known_curves):
    points = (50, 100, 200, 400, 800)
    powers = {"a": (1.0, 1.0), "b": (0.4, 0.5), "c": (0.7, 2.0)}
    known_curves(
        {
            name: curve(points, [*(scale * (k / 50) ** -power for k in points[:-1]), 0.0])
            for name, (scale, power) in powers.items()
        }
    )
    session = KnownSession(dict.fromkeys(powers, (50, 400)), dict.fromkeys(powers, 800))
    kept = session.allocate(EpsilonAllocation(), 500)
    errors = [scale * (kept[name] / 50) ** -power for name, (scale, power) in powers.items()]
    assert max(errors) <= 1.03 * min(errors)


def test_a_curve_is_interpolated_log_linearly():
    errors = curve((50, 100, 400), (0.8, 0.2, 0.05))
    assert errors.fewest_within(1.0) == 50
    assert errors.fewest_within(0.4) == pytest.approx(50 * 2**0.5)
    assert errors.fewest_within(0.1) == pytest.approx(200)
    assert errors.fewest_within(0.01) == 400
    kept, values = errors.on_grid(5)
    assert kept == pytest.approx([50 * 8 ** (i / 4) for i in range(5)])
    assert values == pytest.approx([0.8 * (k / 50) ** -2 if k < 100 else 0.2 * (k / 100) ** -1 for k in kept])


def test_the_sum_of_squared_errors_times_effects_is_minimal():
    points = (4, 8, 16, 32, 64)
    curves = {
        name: curve(points, [*(scale * 2.0 ** -(k / rate) for k in points[:-1]), 0.0])
        for name, scale, rate in (("a", 1.0, 6.0), ("b", 0.6, 9.0))
    }
    effects = {"a": 1.0, "b": 3.0}
    kept = kept_by_effect(curves, effects, 48, {"a": (4, 64), "b": (4, 64)})

    def cost(a):
        total = 0.0
        for name, k in (("a", a), ("b", 48 - a)):
            i = next(i for i in range(4) if points[i] <= k <= points[i + 1])
            few, many = (max(curves[name].errors[j], 1e-6) for j in (i, i + 1))
            part = torch.tensor(k / points[i]).log() / torch.tensor(points[i + 1] / points[i]).log()
            total += effects[name] * (few * (many / few) ** float(part)) ** 2
        return total

    best = min(range(4, 45), key=cost)
    assert cost(kept["a"]) <= 1.05 * cost(best)


@pytest.mark.parametrize("total", [200, 500])
def test_a_layer_with_a_larger_effect_keeps_more_weights(total):
    plain, larger = (kept_by_effect(CURVES, EQUAL | {"b": effect}, total, FREE) for effect in (1.0, 5.0))
    assert larger["b"] > plain["b"]
    assert kept_by_effect(CURVES, dict.fromkeys(SIZES, 1e-9), total, FREE) == plain


def test_a_curve_of_one_point_is_that_point():
    assert curve((1,), (0.0,)).on_grid() == ([1.0], [0.0])
    result = trim(nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 1)), [torch.randn(64, 4)], sparsity=0.4)
    assert [report.zeros for report in result.reports] == [2, 0]


# --- on a network of 600 + 600 + 520 weights

NAMES = {
    "uniform": UniformAllocation(),
    "global": GlobalAllocation(),
    "epsilon": EpsilonAllocation(),
    "magnitude": MagnitudeAllocation(),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [0.4, 0.777, 0.95])
def test_the_total_is_exact_to_the_weight(name, sparsity):
    model = wide_mlp()
    result = trim(model, mlp_batches(), sparsity=sparsity, allocate=name)
    assert sum(report.zeros for report in result.reports) == round(sparsity * 1720)
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 2, 4)) == round(sparsity * 1720)


@pytest.mark.parametrize("name", NAMES)
def test_layers_with_a_budget_of_their_own_are_left_out_and_limits_are_respected(name):
    own = {"0": {"sparsity": 0.25}, "2": {"max_sparsity": 0.55}, "4": {"min_sparsity": 0.5}}
    result = trim(wide_mlp(), mlp_batches(), sparsity=0.5, allocate=name, per_layer=own)
    first, second, third = (report.zeros for report in result.reports)
    assert first == 150
    assert second + third == 560
    assert second <= round(0.55 * 600)
    assert third >= 260


@pytest.mark.parametrize("name", ["global", "epsilon"])
def test_limits_that_leave_no_budgets_are_refused_before_curves_are_measured(name, monkeypatch):
    monkeypatch.setattr("lightning_nettrim.pruning.allocation.curves._measure", pytest.fail)
    own = {layer: {"max_sparsity": 0.4} for layer in ("0", "2", "4")}
    with pytest.raises(ValueError, match="expected between 1032 and 1720 weights to be kept .* got 860"):
        trim(wide_mlp(), mlp_batches(), sparsity=0.5, allocate=name, per_layer=own)


def test_the_global_allocation_changes_the_output_least():
    errors = {}
    for name in ("uniform", "global", "epsilon"):
        errors[name] = trim(wide_mlp(), mlp_batches(), sparsity=0.7, allocate=name).end_to_end_error
    assert errors["global"] == min(errors.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_its_object_allocate_alike_and_leave_the_trained_weights(name):
    model = wide_mlp()
    before = copied_state(model)
    session = calibrate(model, CalibrationSource(mlp_batches()), PruningConfig(sparsity=0.7, allocate=name))
    budgets = allocate(session, 0.7)
    assert equal_states(model, before)
    named = replace(session, config=replace(session.config, allocate=NAMES[name]))
    assert allocate(named, 0.7) == budgets == NAMES[name].allocate(session, 0.7)
    assert allocate(session, None) == session.plan.budgets


@dataclass(frozen=True)
class LastLayerDense(Allocation):
    """All zeros in the layers before the last."""

    def allocate(self, session, sparsity: float) -> dict[str, Budget]:
        sizes = session.shared_sizes()
        zeros, last = sparsity * sum(sizes.values()), session.last
        others = sum(size for name, size in sizes.items() if name != last)
        return session.budgets_keeping(
            {name: size if name == last else round(size * (1 - zeros / others)) for name, size in sizes.items()}
        )


def test_an_allocation_can_be_defined_by_the_user():
    result = trim(wide_mlp(), mlp_batches(), sparsity=0.5, allocate=LastLayerDense())
    assert [report.zeros for report in result.reports] == [430, 430, 0]


def test_curves_are_measured_once_and_decrease_to_zero(monkeypatch):
    model = wide_mlp()
    before = copied_state(model)
    session = calibrate(model, CalibrationSource(mlp_batches()), PruningConfig(sparsity=0.7))
    curves = measure_curves(session, ["0", "4"])
    assert equal_states(model, before)
    for name, size in (("0", 600), ("4", 520)):
        kept, errors = curves[name].kept, curves[name].errors
        assert kept == (*(size - round((1 - density) * size) for density in DENSITIES), size)
        assert errors[-1] == 0
        assert all(many < few for few, many in zip(errors, errors[1:], strict=False))

    def solve_weighted(*arguments):
        pytest.fail("a curve is measured again")

    monkeypatch.setattr("lightning_nettrim.pruning.allocation.curves.solve_weighted", solve_weighted)
    assert measure_curves(session, ["4", "0"]) == curves


class EqualLayers(nn.Module):
    """Five Linear layers of one shape, two before a ReLU, one before a LeakyReLU, one before a residual sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(5))
        self.convs = nn.ModuleList(nn.Conv1d(4, 6, 1, groups=2) for _ in range(2))
        self.double()

    def forward(self, x):
        """``(B, 20)`` to ``(B, 6, 5)``."""
        a, b, c, d, e = self.layers
        x = b(a(x).relu()).relu()
        x = x + d(nn.functional.leaky_relu(c(x), 0.1))
        x = e(x).reshape(-1, 4, 5)
        return self.convs[0](x).relu() + self.convs[1](x)


def test_curves_of_layers_of_equal_shape_are_those_of_each_alone(monkeypatch):
    model, batches = EqualLayers(), [torch.randn(50, 20, dtype=torch.float64) for _ in range(10)]
    session = calibrate(model, CalibrationSource(batches), PruningConfig(sparsity=0.7))
    alone, solves = measure_curves(session, list(session.plan.layers)), []

    def count(problem, *arguments):
        solves.append(len(problem.X) // problem.groups)
        return solve_weighted(problem, *arguments)

    monkeypatch.setattr("lightning_nettrim.pruning.allocation.curves.solve_weighted", count)
    monkeypatch.setattr("lightning_nettrim.pruning.allocation.curves.ONE_BY_ONE_ON", frozenset())
    session.run.cache.clear()
    together = measure_curves(session, list(session.plan.layers))
    assert list(together) == list(alone)
    assert sum(solves) == sum(len(curve.kept) - 1 for curve in alone.values())
    assert len(solves) < sum(solves)
    for name, curve in alone.items():
        assert together[name].kept == curve.kept
        # conjugate gradients stop when the residuals of all problems of a batch are small
        assert together[name].errors == pytest.approx(curve.errors, rel=1e-4), name


def test_a_curve_is_measured_on_a_sample_of_many_outputs(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 400), nn.ReLU(), nn.Linear(400, 10))
    session = calibrate(model, CalibrationSource([torch.randn(2000, 30)]), PruningConfig(sparsity=0.9))
    sampled = measure_curves(session, ["0"])["0"]
    monkeypatch.setattr("lightning_nettrim.pruning.allocation.curves.MAX_OUTPUTS", 400)
    session.run.cache.clear()
    whole = measure_curves(session, ["0"])["0"]
    assert sampled.kept == whole.kept
    assert sampled.errors == pytest.approx(whole.errors, rel=0.05)
    assert sampled.errors != whole.errors
    reference = DENSITIES.index(reference_density(session))
    assert sampled.errors[reference] == pytest.approx(whole.errors[reference], rel=1e-3)


@pytest.mark.parametrize(("sparsity", "density"), [(0.5, 0.6), (0.7, 0.3), (0.9, 0.15), (0.95, 0.06), (0.999, 0.02)])
def test_the_reference_density_is_near_that_of_the_network(sparsity, density):
    session = calibrate(wide_mlp(), CalibrationSource(mlp_batches()), PruningConfig(sparsity=sparsity))
    assert reference_density(session) == density


def test_without_a_sparsity_the_reference_density_is_the_middle_one():
    session = calibrate(wide_mlp(), CalibrationSource(mlp_batches()), PruningConfig(max_drop=0.1))
    assert reference_density(session) == DENSITIES[2]
