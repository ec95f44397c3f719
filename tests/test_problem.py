"""The program's formulas, against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import VARIANTS, layer, optimum

from lightning_nettrim import LayerProblem


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_any_dual_guess_gives_a_lower_bound(options):
    problem = layer(**options)
    best = optimum(problem)
    for size in (1e-3, 1.0, 1e3):
        nu = size / problem.X.norm() * torch.randn_like(problem.Y)
        guess = nu if problem.Omega is None else torch.where(problem.Omega, nu.abs(), nu)
        assert float(dual_bound(problem, guess)) <= best * (1 + 1e-6) + 1e-9
        assert float(dual_bound(problem, guess + problem.Y * size)) <= best * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"per_neuron": True}, {"rank": 15}, {"cascade": True}])
def test_the_compressed_program_is_the_same_program(options):
    problem = layer(P=500, relu=False, **options)
    small = compress(problem)
    assert small.X.shape[0] == problem.X.shape[1] + 1
    for W in (torch.zeros_like(problem.W), problem.W + 0.1 * torch.randn_like(problem.W)):
        torch.testing.assert_close(violation(small, W), violation(problem, W), rtol=1e-9, atol=1e-9)
    assert optimum(small) == pytest.approx(optimum(problem), rel=1e-5)


def test_programs_that_cannot_be_compressed_are_left_alone():
    for problem in (layer(), layer(relu=False, P=25)):
        assert compress(problem) is problem


def test_violation_is_priced_by_the_dual():
    X, W = torch.eye(2), torch.tensor([[4.0], [0.7]])
    Y, Omega = torch.tensor([[1.0], [0.0]]), torch.tensor([[True], [False]])
    problem = LayerProblem(X, Y, W, epsilon=torch.tensor(2.0), Omega=Omega)
    violation, worth = violation_and_price(problem, W, torch.tensor([[-5.0], [-10.0]]))
    assert float(violation) == pytest.approx(0.5)
    assert float(worth) == pytest.approx(5 * 1 + 10 * 0.7)


def test_trained_weights_are_feasible_and_exact():
    problem = layer(bias=True)
    assert float(violation(problem, problem.W)) <= 1e-12
    assert float(problem.local_error(problem.W)) <= 1e-12
    assert float(problem.objective(problem.W)) == pytest.approx(float(problem.W[:-1].abs().sum()))


def test_violation_is_the_larger_excess_over_epsilon():
    X, W = torch.eye(2), torch.tensor([[4.0], [0.7]])
    Y, Omega = torch.tensor([[1.0], [0.0]]), torch.tensor([[True], [False]])
    problem = LayerProblem(X, Y, W, epsilon=torch.tensor(2.0), Omega=Omega)
    assert float(violation(problem, W)) == pytest.approx((3.0 - 2.0) / 2.0)
    lower = replace(problem, V=torch.tensor([[0.0], [-2.0]]))
    assert float(violation(lower, W)) == pytest.approx(2.7 / 2.0)
    inside = torch.tensor([[1.5], [-1.0]])
    assert float(violation(problem, inside)) == 0


def test_relative_error_is_that_after_the_relu():
    X, W = torch.eye(2), torch.tensor([[3.0], [-5.0]])
    problem = LayerProblem(X, torch.tensor([[4.0], [0.0]]), W, torch.tensor(1.0), torch.tensor([[True], [False]]))
    assert float(problem.local_error(W)) == pytest.approx(0.25)
    assert float(replace(problem, Omega=None).local_error(W)) == pytest.approx((1 + 25) ** 0.5 / 4)


def test_nonzeros_rounds_the_zeros():
    problem = replace(layer(N=3, M=3, bias=True), sparsity=0.5)
    assert problem.nonzeros == 9 - round(4.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Y": torch.zeros(200, 3, dtype=torch.float64)}, r"W: expected shape \(40, 3\)"),
        ({"Y": torch.zeros(3, 12, dtype=torch.float64)}, r"Y: expected shape \(200, 12\)"),
        ({"W": torch.zeros(2, 2)}, "W: expected shape"),
        ({"epsilon": torch.tensor(0.0, dtype=torch.float64)}, "epsilon: expected > 0"),
        ({"epsilon": None}, "neither"),
        ({"epsilon": torch.tensor(1.0)}, "epsilon: expected torch.float64"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"Omega": torch.zeros(200, 12)}, "Omega: expected torch.bool"),
        ({"penalty": -torch.ones(40, dtype=torch.float64)}, "penalty"),
        ({"X": torch.full((200, 40), torch.nan, dtype=torch.float64)}, "X: expected finite"),
    ],
)
def test_malformed_problems_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        validate(replace(layer(), **change))


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="float32 or float64"):
        validate(layer(dtype=torch.float16))
