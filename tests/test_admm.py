"""The convex program: against an independent solver, and by its own certificate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import VARIANTS, layer, optimum

from lightning_nettrim import ADMM, LayerProblem, Status, solve

each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@each_variant
def test_reaches_the_optimum_of_an_interior_point_solver(options):
    problem = layer(**options)
    solution = solve(problem, ADMM(atol=1e-4, max_steps=10_000))
    best = optimum(problem)
    assert solution.status == Status.CONVERGED
    assert float(solution.objective) == pytest.approx(best, rel=1e-3, abs=1e-9)
    assert float(problem.violation(solution.W)) <= 1e-4
    assert float(solution.bound) <= best * (1 + 1e-6) + 1e-9


@each_variant
def test_single_precision_is_certified(options):
    problem = layer(**options, dtype=torch.float32)
    solution = solve(problem, ADMM())
    assert solution.status == Status.CONVERGED
    assert abs(float(solution.gap)) <= 1e-3
    assert float(problem.violation(solution.W)) <= 1e-3
    assert solution.W.dtype == torch.float32


def test_the_defaults_solve_the_forty_input_layer_of_the_readme():
    problem = layer(P=1000, N=40, M=20, bias=True)
    solution = solve(problem, ADMM())
    assert float(solution.objective) == pytest.approx(optimum(problem), rel=1e-3)
    norm = problem.Y.norm()
    assert float(problem.violation(solution.W) * problem.epsilon / norm) <= 1e-4


def test_report_of_the_solution_is_that_of_its_weights():
    problem = layer(bias=True)
    solution = solve(problem, ADMM())
    torch.testing.assert_close(solution.objective, problem.objective(solution.W), rtol=0, atol=0)
    torch.testing.assert_close(solution.violation, problem.violation(solution.W), rtol=0, atol=0)
    assert solution.objective >= solution.bound
    assert (solution.W == 0).sum() > 0.3 * solution.W.numel()


def test_a_batch_is_its_members_one_by_one():
    members = [layer(bias=True, seed=seed, gain=gain) for seed, gain in ((0, 0.02), (1, 0.1), (2, 0.7))]
    batch = LayerProblem(
        *(torch.stack([getattr(m, name) for m in members]) for name in ("X", "Y", "W", "epsilon", "Omega")),
        penalty=members[0].penalty,
    )
    together = solve(batch, ADMM())
    alone = [solve(member, ADMM()) for member in members]
    assert together.steps.tolist() == [int(s.steps) for s in alone]
    assert together.steps.unique().numel() > 1
    torch.testing.assert_close(together.W, torch.stack([s.W for s in alone]), rtol=1e-9, atol=1e-12)
    assert bool(((together.W == 0) == torch.stack([s.W == 0 for s in alone])).all())


def test_a_batch_of_layers_with_balls_per_neuron():
    members = [layer(seed=seed, per_neuron=True, M=4) for seed in (0, 1)]
    names = ("X", "Y", "W", "epsilon", "Omega")
    batch = LayerProblem(*(torch.stack([getattr(m, name) for m in members]) for name in names))
    together = solve(batch, ADMM())
    for objective, member in zip(together.objective, members, strict=True):
        assert float(objective) == pytest.approx(optimum(member), rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("options", [{"bias": True}, {"relu": False}, {"cascade": True, "bias": True}])
def test_a_sparsity_is_met_to_the_weight(sparsity, options):
    problem = replace(layer(**options), epsilon=None, sparsity=sparsity)
    solution = solve(problem, ADMM())
    prunable = solution.W[(problem.weights > 0).squeeze(-1)]
    assert int((prunable == 0).sum()) == round(sparsity * prunable.numel())
    assert int((prunable != 0).sum()) == problem.nonzeros
    assert solution.status == Status.CONVERGED


def test_a_batch_at_a_sparsity_is_met_in_each_member():
    members = [layer(seed=seed) for seed in (0, 1)]
    X, Y, W, Omega = (torch.stack([getattr(m, name) for m in members]) for name in ("X", "Y", "W", "Omega"))
    solution = solve(LayerProblem(X, Y, W, Omega=Omega, sparsity=0.7), ADMM())
    assert (solution.W != 0).sum((-2, -1)).tolist() == [round(0.3 * 480)] * 2


def test_more_radius_more_zeros_and_less_norm():
    problem = layer()
    solutions = [solve(replace(problem, epsilon=gain * problem.Y.norm()), ADMM()) for gain in (0.05, 0.2, 0.6)]
    zeros = [int((s.W == 0).sum()) for s in solutions]
    norms = [float(s.objective) for s in solutions]
    assert zeros == sorted(zeros)
    assert norms == sorted(norms, reverse=True)


def test_too_few_steps_are_admitted():
    solution = solve(layer(), ADMM(max_steps=10))
    assert solution.status == Status.MAX_STEPS
    assert int(solution.steps) == 10
    assert torch.isfinite(solution.gap)


def test_an_infeasible_program_is_called_so():
    X = torch.ones(4, 1, dtype=torch.float64)
    Y = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    problem = LayerProblem(X, Y, torch.ones(1, 1, dtype=X.dtype), epsilon=torch.tensor(0.1, dtype=X.dtype))
    assert solve(problem, ADMM(max_steps=20_000)).status == Status.INFEASIBLE


def test_an_overflow_is_called_so_and_returns_the_trained_weights():
    problem = layer(dtype=torch.float32, scale=1e30)
    solution = solve(problem, ADMM())
    assert solution.status == Status.NONFINITE
    assert torch.equal(solution.W, problem.W)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_steps": 0}, "max_steps"), ({"rtol": 0.0}, "rtol"), ({"relaxation": 2.0}, "relaxation")],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ADMM(**arguments)
