"""Cardinality: known supports, the best of all supports, comparisons with magnitude."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from problems import VARIANTS, distance, layer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nettrim import Cardinality, Magnitude, parse_pattern, refit, solve
from lightning_nettrim.solvers.cardinality import compute_spectrum


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_response_is_never_worse_than_that_of_magnitude_and_refit(name, sparsity):
    problem = replace(layer(**VARIANTS[name]), sparsity=sparsity)
    fitted = refit(problem, solve(problem, Cardinality()).W)
    baseline = refit(problem, solve(problem, Magnitude()).W)
    assert distance(problem, fitted) <= distance(problem, baseline) * (1 + 1e-5) + 1e-9 * problem.Y.norm()


def test_a_warm_start_gives_the_same_solution():
    problem = layer(bias=True)
    state = solve(replace(problem, sparsity=0.5), Cardinality()).state
    at = replace(problem, sparsity=0.8)
    assert torch.equal(solve(at, Cardinality(), state).W, solve(at, Cardinality()).W)


class SynchronizationCounter(TorchDispatchMode):
    """Counts the operators at which the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        masked = func.overloadpacket in (aten.index, aten._index_put_impl_, aten.index_put_) and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        self.count += masked or func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"bias": True}, {"relu": False}])
def test_a_step_does_not_synchronize(options):
    """The inputs are correlated, so that the solution is not compared with that of magnitude."""
    problem, counts = replace(layer(rank=15, **options), sparsity=0.8).flattened(), []
    spectrum = compute_spectrum(problem)
    for max_steps in (30, 90):
        with torch.no_grad(), SynchronizationCounter() as counter:
            Cardinality(max_steps=max_steps).solve(problem, spectrum)
        counts.append(counter.count)
    assert counts[0] == counts[1] > 0


def test_the_support_of_a_sparse_layer_is_recovered():
    problem = layer(P=400, bias=True)
    zeros = 1 - int(problem.W[:-1].count_nonzero()) / problem.W[:-1].numel()
    hidden = replace(problem, sparsity=zeros, W=problem.W + 0.05 * torch.randn(problem.W.shape, dtype=torch.float64))
    solution = solve(hidden, Cardinality(max_steps=480))
    assert torch.equal(solution.W[:-1] != 0, problem.W[:-1] != 0)
    assert solution.status is None
    torch.testing.assert_close(refit(hidden, solution.W), problem.W, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("relu", [True, False])
def test_close_to_the_best_of_all_supports(relu):
    ratios = []
    for seed in range(20):
        problem = replace(layer(P=60, N=8, M=2, relu=relu, positive=True, seed=seed), sparsity=0.5)
        problem = replace(problem, pattern=parse_pattern("per_neuron"))
        best = torch.zeros(2, dtype=torch.float64)
        for m in range(2):
            costs = []
            for support in combinations(range(8), 4):
                W = torch.zeros(8, 1, dtype=torch.float64)
                W[list(support)] = problem.W[list(support), m : m + 1] + 1e-3
                one = replace(problem, Y=problem.Y[:, m : m + 1], W=problem.W[:, m : m + 1], epsilon=None)
                one = replace(one, Omega=one.Omega[:, m : m + 1] if relu else None)
                costs.append(distance(one, refit(one, W)))
            best[m] = min(costs)
        fitted = refit(problem, solve(problem, Cardinality()).W)
        ratios.append(float(distance(problem, fitted) / best.norm()) if best.norm() > 1e-9 else 1.0)
    assert min(ratios) >= 1 - 1e-6
    assert sum(ratio <= 1 + 1e-6 for ratio in ratios) >= 12
    assert sum(ratios) / len(ratios) <= 1.1


def test_the_slack_below_zero_is_used_before_a_relu():
    problem = replace(layer(bias=True), sparsity=0.8)
    linear = replace(problem, Y=problem.X @ problem.W, Omega=None)
    with_relu = refit(problem, solve(problem, Cardinality()).W)
    without_relu = refit(problem, solve(linear, Cardinality()).W)
    assert distance(problem, with_relu) < 0.97 * distance(problem, without_relu)


def test_the_upper_limit_is_respected():
    problem = layer(cascade=True)
    raised = replace(problem, sparsity=0.7, V=problem.V + 1.0)
    assert distance(raised, solve(raised, Cardinality()).W) < distance(
        replace(raised, V=None), solve(raised, Cardinality()).W
    )
    lower = solve(replace(raised, V=None), Cardinality()).W
    assert (
        distance(raised, refit(raised, solve(raised, Cardinality()).W)) <= distance(raised, refit(raised, lower)) * 1.02
    )


def test_more_steps_decrease_the_total_error():
    errors = {steps: 0.0 for steps in (30, 480)}
    for seed in range(6):
        problem = replace(layer(P=300, N=60, M=20, bias=True, seed=seed), sparsity=0.85)
        for steps in errors:
            errors[steps] += float(distance(problem, refit(problem, solve(problem, Cardinality(max_steps=steps)).W)))
    assert errors[480] < errors[30]


def test_with_a_large_ridge_the_largest_trained_weights_are_kept(monkeypatch):
    """As with far fewer samples than inputs, where only the trained weights say which to keep."""
    monkeypatch.setattr("lightning_nettrim.solvers.cardinality._better_of_magnitude", lambda problem, W: W)
    problem = replace(layer(30, 300, 8), epsilon=None, sparsity=0.8, ridge=1e4)
    problem = replace(problem, W=problem.W + 0.1 * torch.randn(problem.W.shape, dtype=torch.float64))
    energy = (problem.W * torch.linalg.vector_norm(problem.X, dim=0).unsqueeze(1)).square()
    largest = problem.keep_largest(energy[None], problem.kept_blocks)[0]
    kept = solve(problem, Cardinality()).W != 0
    assert energy[kept].sum() > 0.99 * energy[largest].sum()


def test_a_small_layer_takes_more_steps(monkeypatch):
    problem = replace(layer(400, 16, 24, cascade=True), epsilon=None, sparsity=0.85)
    more = solve(problem, Cardinality())
    monkeypatch.setattr("lightning_nettrim.solvers.cardinality.SMALL_LAYER", 0)
    fewer = solve(problem, Cardinality())
    assert (int(more.steps), int(fewer.steps)) == (720, 120)
    assert distance(problem, refit(problem, more.W)) < distance(problem, refit(problem, fewer.W))


@pytest.mark.parametrize("P", [200, 30])
@pytest.mark.parametrize("sparsity", [None, 0.02])
def test_weights_of_an_input_that_is_rare_in_the_samples_stay_as_trained(P, sparsity, monkeypatch):
    problem = replace(layer(P, 40, 24, cascade=True), epsilon=None, sparsity=sparsity)
    X, noise = problem.X.clone(), torch.randn(P, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X[:, 0] *= 1e-4
    W = torch.where(problem.W == 0, 0.1, problem.W)
    Y = (X @ W + 0.3 * noise).relu()
    problem = replace(problem, X=X, Y=Y, W=W, Omega=Y > 0, V=None)

    def moved():
        found = refit(problem, problem.W if sparsity is None else solve(problem, Cardinality()).W)
        return float((found[0] - W[0])[found[0] != 0].abs().max())

    assert moved() < 0.01
    monkeypatch.setattr("lightning_nettrim.solvers.refitting.RARE_INPUT_RIDGE", 0.0)
    assert moved() > 1


def test_an_overflow_gives_weights_that_are_not_finite():
    problem = replace(layer(dtype=torch.float32), sparsity=0.5)
    huge = replace(problem, X=problem.X * 1e25, Y=problem.Y * 1e25)
    solution = solve(huge, Cardinality())
    assert not bool(solution.W.isfinite().all())
    assert solution.status is None


@pytest.mark.parametrize(("arguments", "name"), [({"max_steps": 0}, "max_steps"), ({"rho_start": -1.0}, "rho_start")])
def test_invalid_settings_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"Cardinality.{name}: expected > 0"):
        Cardinality(**arguments)
