"""The problem of a layer is the one that is written by hand."""

from __future__ import annotations

import pytest
import torch
from networks import ConvBlock
from torch import nn
from torch.nn import functional as F

from lightning_nettrim import trim
from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.sampling import sample_inputs
from lightning_nettrim.core.certificate import violation
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.layer_problem import layer_problem
from lightning_nettrim.pruning.plan import LayerSelection, make_plan
from lightning_nettrim.pruning.session_setup import start_session
from lightning_nettrim.runtime.run_context import RunContext


def session_of(model, x, **options):
    """A session on all rows of one batch."""
    config = PruningConfig(**({"sparsity": 0.6, "importance": "equal", "max_rows": 10**5} | options))
    calibration_set = sample_inputs(model, [x], 10**5, 0)
    plan = make_plan(model, calibration_set, LayerSelection(config.budget))
    return start_session(model, config, plan, calibration_set, RunContext())


def problem_of(session, name="conv", trained_inputs=True):
    """The problem of a layer with the current weights of the model."""
    with evaluation_mode(session.model):
        recording = session.activations.record(name)[name]
    return layer_problem(session, name, recording, session.plan.budgets[name], trained_inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_convolution_with_batchnorm_and_residual(residual, bias):
    model, x = ConvBlock(residual, bias=bias).eval(), torch.randn(5, 4, 6, 6)
    problem = problem_of(session_of(model, x))
    with torch.no_grad():
        norm = model.norm
        a = norm.weight / (norm.running_var + norm.eps).sqrt()
        c = norm.bias - a * norm.running_mean + (a * model.conv.bias if bias else 0)
        rows = F.unfold(x, 3).mT.flatten(0, 1)
        X = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        W = torch.cat([(model.conv.weight.flatten(1) * a[:, None]).T, c[None]])
        R = model.shortcut(x).flatten(2).mT.flatten(0, 1)
        Y = model.response(x).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(problem.X[0], X)
    torch.testing.assert_close(problem.W[0], W)
    torch.testing.assert_close(problem.Y[0], Y, rtol=1e-5, atol=1e-5)
    assert torch.equal(problem.Omega, problem.Y > 0)
    assert (problem.offset is not None) == residual
    if residual:
        torch.testing.assert_close(problem.offset[0], R)
        torch.testing.assert_close(problem.center[0], Y - R, rtol=1e-5, atol=1e-5)
    assert problem.penalty.tolist() == [1.0] * 36 + [0.0]
    torch.testing.assert_close(problem.response(problem.W), problem.Y, rtol=1e-4, atol=1e-5)


def test_a_cascade_uses_the_current_residual_and_its_trained_weights_are_feasible():
    model, x = ConvBlock(True).eval(), torch.randn(5, 4, 6, 6)
    session = session_of(model, x, epsilon=0.05, sparsity=None)
    with torch.no_grad():
        model.shortcut.weight.mul_(0.9)
        R = model.shortcut(x).flatten(2).mT.flatten(0, 1)
    problem = problem_of(session, trained_inputs=False)
    torch.testing.assert_close(problem.offset[0], R)
    assert float(violation(problem, problem.W)) <= 1e-6


def test_prelu_has_a_slope_for_each_channel():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, 0.1, 0.5, 1.0]))
    x = torch.randn(4, 3, 6, 6)
    problem = problem_of(session_of(model, x), "0")
    assert problem.rectifier.slope.flatten().tolist() == pytest.approx([1e-6, 0.1, 0.5, 1.0])
    torch.testing.assert_close(problem.response(problem.W), problem.Y, rtol=1e-4, atol=1e-5)
    linear = problem_of(session_of(model, x, epsilon=0.1, sparsity=None), "0")
    assert linear.Omega is None
    torch.testing.assert_close(linear.response(linear.W), linear.Y, rtol=1e-4, atol=1e-5)
    result = trim(model, [torch.randn(40, 3, 6, 6)], sparsity=0.5)
    assert 0 < result.reports[0].local_error < 1


@pytest.mark.parametrize(("activation", "factor"), [(nn.ReLU6(), 6), (nn.Hardtanh(-0.5, 0.5), 1)])
def test_a_response_with_two_bounds_is_certified(activation, factor):
    model = nn.Sequential(nn.Linear(12, 8), activation, nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.mul_(factor)
    result = trim(model, [torch.randn(400, 12)], epsilon=0.1)
    for report in result.reports:
        assert report.status == "CONVERGED"
        assert 0 <= report.duality_gap <= 1e-3
        assert report.violation <= 1e-3
