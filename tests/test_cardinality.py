"""Methods at a sparsity: exact counts in every pattern, known optima, baselines by their definitions."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from problems import VARIANTS, distance, layer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nettrim import Cardinality, LayerProblem, Magnitude, Pattern, SparseGPT, Status, Wanda, refit, solve
from lightning_nettrim.solvers import cardinality
from lightning_nettrim.solvers.cardinality import spectrum_of

SOLVERS = [Cardinality(), Magnitude(), Wanda(), SparseGPT(), SparseGPT(block=8)]
PATTERNS = ["unstructured", "per_neuron", "2:4", "1:4", "4:8", "neuron", "4x4"]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{"bias": True}, {"relu": False}, {"dead": True}, {"P": 25, "cascade": True}], ids=str
)
def test_counts_are_exact_in_every_pattern(solver, pattern, dtype, options):
    problem = layer(dtype=dtype, **options)
    problem = replace(problem, W=problem.W + 0.01 * torch.randn(problem.W.shape, dtype=dtype), epsilon=None)
    problem = replace(problem, sparsity=parse_pattern(pattern).sparsity or 0.75, pattern=parse_pattern(pattern))
    solution = solve(problem, solver)
    W = solution.W[:40]
    assert solution.W.dtype == dtype
    assert solution.W.isfinite().all()
    assert int(W.count_nonzero()) == problem.nonzeros
    blocks = (problem.pattern.groups(W) != 0).any(-1)
    assert bool((blocks.sum(-1) == problem.kept_blocks).all())
    fitted = refit(problem, solution.W)
    assert torch.equal(fitted[:40] != 0, W != 0) or pattern == "4x4" or options.get("dead")
    assert bool((fitted[:40][W == 0] == 0).all())
    if solver == Cardinality():
        baseline = refit(problem, solve(problem, Magnitude()).W)
        assert distance(problem, fitted) <= distance(problem, baseline) * (1 + 1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_never_a_worse_response_than_magnitude_and_refit(name, sparsity):
    problem = replace(layer(**VARIANTS[name]), sparsity=sparsity)
    fitted = refit(problem, solve(problem, Cardinality()).W)
    baseline = refit(problem, solve(problem, Magnitude()).W)
    assert distance(problem, fitted) <= distance(problem, baseline) * (1 + 1e-5) + 1e-9 * problem.Y.norm()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_zero_sparsity_returns_the_trained_layer(solver):
    problem = replace(layer(bias=True), sparsity=0.0)
    assert torch.allclose(solve(problem, solver).W, problem.W, rtol=0, atol=0)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_its_members_one_by_one(solver, pattern, dtype):
    members = [layer(N=48, M=16, dtype=dtype, seed=seed) for seed in range(3)]
    shared = {"sparsity": 0.5, "pattern": parse_pattern(pattern)}
    stacked = {name: torch.stack([getattr(m, name) for m in members]) for name in ("X", "Y", "W", "Omega")}
    raise_together = solve(LayerProblem(**stacked, **shared), solver)
    for i, member in enumerate(members):
        problem = LayerProblem(*(getattr(member, n) for n in ("X", "Y", "W")), Omega=member.Omega, **shared)
        alone = solve(problem, solver)
        assert torch.equal(raise_together.W[i] != 0, alone.W != 0)
        answers = (refit(problem, W) for W in (raise_together.W[i], alone.W))  # a product's rounding sees the batch
        torch.testing.assert_close(*answers, rtol=0, atol=1e-6)
        assert raise_together.status[i] == alone.status


def test_a_warm_start_gives_the_same_answer_as_a_cold_one():
    problem = layer(bias=True)
    state = solve(replace(problem, sparsity=0.5), Cardinality()).state
    at = replace(problem, sparsity=0.8)
    assert torch.equal(solve(at, Cardinality(), state).W, solve(at, Cardinality()).W)


class Waits(TorchDispatchMode):
    """Counts the operators at which a host waits for its device."""

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
def test_a_step_does_not_wait_for_the_device(options):
    problem, counts = replace(layer(**options), sparsity=0.8), []
    for steps in (30, 90):
        with torch.no_grad(), Waits() as waits:
            Cardinality(steps=steps)._run(problem.flattened(), spectrum_of(problem.flattened()))
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


def test_a_sparse_layer_is_found_again():
    problem = layer(P=400, bias=True)
    zeros = 1 - int(problem.W[:-1].count_nonzero()) / problem.W[:-1].numel()
    hidden = replace(problem, sparsity=zeros, W=problem.W + 0.05 * torch.randn(problem.W.shape, dtype=torch.float64))
    solution = solve(hidden, Cardinality(steps=480))
    assert torch.equal(solution.W[:-1] != 0, problem.W[:-1] != 0)
    assert solution.status == Status.CONVERGED
    torch.testing.assert_close(refit(hidden, solution.W), problem.W, rtol=0, atol=1e-6)


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


def test_behind_a_relu_the_slack_is_used():
    problem = replace(layer(bias=True), sparsity=0.8)
    linear = replace(problem, Y=problem.X @ problem.W, Omega=None)
    consistent = refit(problem, solve(problem, Cardinality()).W)
    ignorant = refit(problem, solve(linear, Cardinality()).W)
    assert distance(problem, consistent) < 0.97 * distance(problem, ignorant)


def test_a_ceiling_is_respected():
    problem = layer(cascade=True)
    raised = replace(problem, sparsity=0.7, V=problem.V + 1.0)
    assert distance(raised, solve(raised, Cardinality()).W) < distance(
        replace(raised, V=None), solve(raised, Cardinality()).W
    )
    lower = solve(replace(raised, V=None), Cardinality()).W
    assert (
        distance(raised, refit(raised, solve(raised, Cardinality()).W)) <= distance(raised, refit(raised, lower)) * 1.02
    )


def test_more_steps_are_no_worse_on_the_whole():
    errors = {steps: 0.0 for steps in (30, 480)}
    for seed in range(6):
        problem = replace(layer(P=300, N=60, M=20, bias=True, seed=seed), sparsity=0.85)
        for steps in errors:
            errors[steps] += float(distance(problem, refit(problem, solve(problem, Cardinality(steps=steps)).W)))
    assert errors[480] < errors[30]


def test_a_layer_of_few_weights_takes_more_steps(monkeypatch):
    problem = replace(layer(400, 16, 24, cascade=True), epsilon=None, sparsity=0.85)
    many = solve(problem, Cardinality())
    monkeypatch.setattr(cardinality, "FEW", 0)
    few = solve(problem, Cardinality())
    assert (int(many.steps), int(few.steps)) == (720, 120)
    assert distance(problem, refit(problem, many.W)) < distance(problem, refit(problem, few.W))


@pytest.mark.parametrize("P", [200, 30])
@pytest.mark.parametrize("sparsity", [None, 0.02])
def test_weights_of_an_input_that_the_samples_hardly_show_stay_as_trained(P, sparsity, monkeypatch):
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
    monkeypatch.setattr(sys.modules["lightning_nettrim.solvers.refit"], "HOLD", 0.0)
    assert moved() > 1


def test_nan_is_a_status_and_the_trained_weights():
    problem = replace(layer(dtype=torch.float32), sparsity=0.5)
    huge = replace(problem, X=problem.X * 1e25, Y=problem.Y * 1e25)
    solution = solve(huge, Cardinality())
    assert solution.status == Status.NONFINITE
    assert torch.equal(solution.W, huge.W)


def test_wanda_ranks_by_weight_times_energy():
    problem = replace(layer(bias=True), sparsity=0.6, pattern=parse_pattern("per_neuron"))
    W = solve(problem, Wanda()).W[:-1]
    score = problem.W[:-1].abs() * problem.X[:, :-1].norm(dim=0)[:, None]
    for kept, size in zip(W.mT != 0, score.mT, strict=True):
        assert size[kept].min() >= size[~kept].max()


def test_sparsegpt_is_the_surgeon_without_looking_back():
    problem = replace(layer(N=12, M=5), sparsity=0.5)
    W = solve(problem, SparseGPT()).W
    H = problem.X.mT @ problem.X
    H += 0.01 * H.diagonal().mean() * torch.eye(12, dtype=H.dtype)
    expected = problem.W.clone()
    for i in range(12):
        rest = torch.linalg.inv(H[i:, i:])
        lost = torch.where(W[i] == 0, expected[i], 0)
        expected[i:] -= rest[0][:, None] / rest[0, 0] * lost
    torch.testing.assert_close(W, torch.where(W == 0, 0, expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("solver", "arguments", "name"),
    [(Cardinality, {"steps": 0}, "steps"), (Cardinality, {"first": -1.0}, "first"), (SparseGPT, {"block": 0}, "block")],
)
def test_refuses_numbers_that_cannot_be_meant(solver, arguments, name):
    with pytest.raises(ValueError, match=f"{solver.__name__}.{name}: expected > 0"):
        solver(**arguments)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_needs_a_sparsity(solver):
    with pytest.raises(ValueError, match="expected a problem with a sparsity"):
        solve(layer(), solver)
