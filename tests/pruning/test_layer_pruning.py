"""Pruning one layer: its problem, its outcome, and its report."""

from __future__ import annotations

import pytest
import torch
from networks import copied_state, count_hooks, equal_states, mlp, mlp_batches, outputs

from lightning_nettrim import ADMM, Budget, CalibrationSource, Cardinality, LayerProblem, PruningConfig, Wanda, trim
from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.core.certificate import violation
from lightning_nettrim.layers import masking
from lightning_nettrim.pruning.layer import local_error, prune_layer
from lightning_nettrim.pruning.layer_problem import layer_problem
from lightning_nettrim.pruning.session_setup import calibrate


def session_of(model, dtype=torch.float32, **options):
    config = PruningConfig(**({"sparsity": 0.5, "importance": "equal"} | options))
    return calibrate(model, CalibrationSource(mlp_batches(dtype=dtype)), config)


def test_the_objective_of_the_convex_program_is_that_of_the_weights_without_a_refit():
    model = mlp(torch.float64)
    data = mlp_batches(dtype=torch.float64)
    (report,) = trim(model, data, epsilon=0.1, refit=False, targets=["0"]).reports
    assert report.objective == pytest.approx(float(model[0].weight.detach().abs().sum()), rel=1e-9)
    assert report.local_error <= 0.1 * (1 + 2e-3)


def test_an_outcome_changes_nothing_in_the_model():
    model = mlp()
    before, session = copied_state(model), session_of(model)
    with evaluation_mode(model):
        outcome = prune_layer(session, "2", Budget(sparsity=0.7))
    assert equal_states(model, before)
    assert count_hooks(model) == 0
    assert set(outcome.values) == {"2.weight", "2.bias"}
    assert int((outcome.values["2.weight"] == 0).sum()) == outcome.report.zeros == round(0.7 * 480)
    assert outcome.report.end_to_end_error != outcome.report.end_to_end_error  # NaN until all layers are pruned
    masking.assign(model, outcome.values)
    assert torch.equal(model[2].weight, outcome.values["2.weight"])


def test_the_local_error_is_that_of_the_response_of_the_module():
    model, data = mlp(torch.float64), mlp_batches(dtype=torch.float64)
    trained, session = outputs(model[:4], data), session_of(model, torch.float64)
    with evaluation_mode(model):
        outcome = prune_layer(session, "2", Budget(sparsity=0.7))
        masking.assign(model, outcome.values)
    change = float((outputs(model[:4], data) - trained).norm() / trained.norm())
    assert outcome.report.local_error == pytest.approx(change, rel=1e-9)


def test_a_chain_of_layers_has_distances_on_the_inputs_of_the_trained_network():
    model, data = mlp(torch.float64), mlp_batches(dtype=torch.float64)
    session = session_of(model, torch.float64)
    hidden, trained = outputs(model[:2], data), outputs(model[:4], data)
    with evaluation_mode(model):
        first = prune_layer(session, "0", Budget(sparsity=0.5), chained=True)
        masking.assign(model, first.values)
        second = prune_layer(session, "2", Budget(sparsity=0.5), previous="0", chained=True)
        masking.assign(model, second.values)
        apart = prune_layer(session, "4", Budget(sparsity=0.5), previous="2", chained=False)
    assert first.chained
    assert first.trained_distance == pytest.approx(float((outputs(model[:2], data) - hidden).norm()), rel=1e-9)
    assert second.chained
    distance = float((outputs(model[2:4], [hidden]) - trained).norm())  # the pruned layer on the trained inputs
    assert second.trained_distance == pytest.approx(distance, rel=1e-9)
    assert (apart.chained, apart.trained_distance) == (False, 0.0)


def problem_of(session, name: str, budget: Budget, trained_inputs: bool) -> LayerProblem:
    recording = session.activations.record(name, inputs=[name], outputs=[])[name]
    return layer_problem(session, name, recording, budget, trained_inputs)


def test_in_a_cascade_the_trained_weights_are_feasible_for_the_convex_program():
    model = mlp(torch.float64)
    session = session_of(model, torch.float64, sparsity=None, epsilon=0.01)
    with evaluation_mode(model):
        exact = problem_of(session, "2", Budget(epsilon=0.01), trained_inputs=True)
        assert exact.V is None
        assert float(exact.epsilon) == pytest.approx(0.01 * float(exact.Y.norm()))
        masking.assign(model, prune_layer(session, "0", Budget(epsilon=0.3)).values)
        problem = problem_of(session, "2", Budget(epsilon=0.01), trained_inputs=False)
    distance = float(problem.on_Omega(problem.X @ problem.W - problem.Y).norm())
    assert float(problem.epsilon) == pytest.approx(1.1**0.5 * distance, rel=1e-9)
    assert float(problem.epsilon) > float(exact.epsilon)
    assert bool((problem.V >= 0).all())
    assert float(violation(problem, problem.W)) == 0
    assert local_error(problem, problem.W) > 0
    assert local_error(exact, exact.W) == pytest.approx(0, abs=1e-12)


def test_other_methods_have_the_limit_of_the_trained_layer_in_a_cascade():
    model = mlp(torch.float64)
    session = session_of(model, torch.float64, sparsity=None, epsilon=0.01, solver=Cardinality())
    with evaluation_mode(model):
        masking.assign(model, prune_layer(session, "0", Budget(sparsity=0.5)).values)
        problem = problem_of(session, "2", Budget(epsilon=0.01), trained_inputs=False)
    assert problem.V is None
    assert float(problem.epsilon) == pytest.approx(0.01 * float(problem.Y.norm()))


@pytest.mark.parametrize(
    ("options", "certified"),
    [
        ({"epsilon": 0.1}, True),
        ({"sparsity": 0.5, "solver": ADMM(rtol=1e-2)}, True),
        ({"sparsity": 0.5}, False),
        ({"sparsity": 0.5, "solver": Wanda()}, False),
        ({"epsilon": 0.2, "solver": Wanda()}, False),
    ],
    ids=str,
)
def test_only_methods_with_a_certificate_report_a_status(options, certified):
    result = trim(mlp(), mlp_batches(), targets=["2"], allocate="uniform", **options)
    (report,) = result.reports
    for name in ("status", "objective", "bound", "duality_gap", "violation"):
        assert (getattr(report, name) is not None) == certified, name
    head = result.table().splitlines()[0]
    for column in ("status", "duality gap", "violation"):
        assert (column in head) == certified, column
    assert ("CONVERGED" in report.line()) == certified
    assert ("duality_gap" in report.scalars()) == certified
