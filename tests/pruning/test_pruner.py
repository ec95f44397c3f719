"""Pruning all layers: what is certified, exact sparsity, patterns, and the errors of the whole network."""

from __future__ import annotations

import pytest
import torch
from networks import conv2d_inputs, conv2d_network, copied_state, equal_states, mlp, mlp_batches, outputs
from torch import nn

from lightning_nettrim import ADMM, CalibrationSource, Magnitude, PruningConfig, Wanda, trim
from lightning_nettrim.pruning.pruner import prune_network
from lightning_nettrim.pruning.session_setup import calibrate

QUICK = ADMM(rtol=1e-2, atol=1e-2)


# --- the certificate


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("penalize_bias", [False, True])
def test_an_epsilon_limits_the_local_errors_and_the_end_to_end_bound_holds(scheme, penalize_bias):
    model, data = mlp(), mlp_batches()
    dense, before = outputs(model, data), copied_state(model)
    result = trim(model, data, epsilon=0.1, scheme=scheme, penalize_bias=penalize_bias)
    distance = float((outputs(model, data) - dense).norm())
    assert result.output_distance == pytest.approx(distance, rel=1e-4)
    assert result.output_norm == pytest.approx(float(dense.norm()), rel=1e-5)
    assert result.end_to_end_error == pytest.approx(distance / float(dense.norm()), rel=1e-4)
    assert 0 < result.end_to_end_error <= result.end_to_end_bound
    assert [report.name for report in result.reports] == ["0", "2", "4"]
    for report in result.reports:
        assert report.status == "CONVERGED"
        assert report.local_error <= 0.1 * (1 + 1e-3) or scheme == "cascade"
        assert report.local_error <= report.epsilon * 1.001
        assert report.objective >= report.bound * (1 - 1e-3)
        assert report.sparsity > 0.1
        weight = model.get_submodule(report.name).weight
        bias = model.get_submodule(report.name).bias
        count = int((weight == 0).sum()) + (int((bias == 0).sum()) if penalize_bias else 0)
        assert report.zeros == count
    assert list(model.state_dict()) == list(before)
    assert ("0.bias" in result.masks) == penalize_bias


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("options", [{"epsilon": 0.2, "solver": QUICK}, {"sparsity": 0.6, "solver": Wanda()}], ids=str)
def test_the_end_to_end_error_is_relative_everywhere(scheme, options):
    result = trim(mlp(), mlp_batches(), allocate="uniform", scheme=scheme, **options)
    assert result.end_to_end_error == result.output_distance / result.output_norm
    assert result.reports[-1].end_to_end_error == result.end_to_end_error
    assert result.total()["end_to_end_error"] == result.end_to_end_error
    assert result.total()["end_to_end_bound"] == result.end_to_end_bound
    assert result.total()["output_distance"] == result.output_distance
    assert 0 < result.end_to_end_error <= result.end_to_end_bound
    assert f"end-to-end error {result.end_to_end_error:.4f} (certified: at most" in result.table()


def test_the_end_to_end_error_does_not_depend_on_the_scale_of_the_output():
    errors = []
    for factor in (1.0, 1024.0):
        model = mlp(torch.float64)
        with torch.no_grad():
            model[4].weight.mul_(factor)
            model[4].bias.mul_(factor)
        result = trim(model, mlp_batches(dtype=torch.float64), epsilon=0.2, solver=QUICK)
        errors.append((result.end_to_end_error, result.end_to_end_bound))
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


def test_leading_dimensions_and_other_modules_between_layers():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))
    result = trim(model, [torch.randn(4, 5, 6) for _ in range(8)], epsilon=0.2)
    assert [report.status for report in result.reports] == ["CONVERGED"] * 2
    assert result.end_to_end_bound is None


def test_a_layer_that_is_called_twice_is_one_problem():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(self.a(x).relu()).relu())

    result = trim(Twice(), [torch.rand(40, 8) for _ in range(4)], epsilon=0.2)
    assert [report.name for report in result.reports] == ["a", "b"]
    assert result.end_to_end_bound is None


def test_a_subclass_of_linear_keeps_the_certificate_of_the_network():
    class Own(nn.Linear):
        """A Linear by another name."""

    plain, own = mlp(), mlp()
    own[2] = Own(30, 16)
    own[2].load_state_dict(plain[2].state_dict())
    bounds = [trim(model, mlp_batches(), epsilon=0.2, solver=QUICK).end_to_end_bound for model in (plain, own)]
    assert bounds[0] == bounds[1] > 0


# --- sparsity


@pytest.mark.parametrize("solver", [QUICK, Magnitude()])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_the_sparsity_is_exact_in_every_layer_and_in_total(solver, scheme):
    model = mlp()
    result = trim(
        model, mlp_batches(), sparsity=0.7, allocate="uniform", solver=solver, scheme=scheme,
        per_layer={"4": {"sparsity": 0.5}},
    )  # fmt: skip
    zeros = [round(0.7 * 600), round(0.7 * 480), round(0.5 * 64)]
    assert [report.zeros for report in result.reports] == zeros
    assert [int((model[i].weight == 0).sum()) for i in (0, 2, 4)] == zeros
    assert result.sparsity == sum(zeros) / 1144
    parameters = sum(p.numel() for p in model.parameters())
    assert result.model_sparsity == sum(zeros) / parameters
    for name, kept in result.masks.items():
        assert torch.equal(kept, model.get_parameter(name) != 0)


def test_sparsity_zero_leaves_the_trained_weights():
    model = mlp()
    before = copied_state(model)
    result = trim(model, mlp_batches(), sparsity=0.0)
    assert equal_states(model, before)
    assert result.end_to_end_error == result.output_distance == 0
    assert [report.duality_gap for report in result.reports] == [None] * 3


def test_a_cascade_compensates_for_the_layers_before():
    errors = {}
    for scheme in ("cascade", "parallel"):
        result = trim(mlp(), mlp_batches(), sparsity=0.6, allocate="uniform", solver=QUICK, scheme=scheme)
        errors[scheme] = result.end_to_end_error
    assert errors["cascade"] < errors["parallel"]


@pytest.mark.parametrize("pattern", ["per_neuron", "2:4", "1:4", "neuron", "2x5"])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_patterns_hold_in_the_weights_of_the_modules(pattern, scheme):
    model = mlp()
    free = {} if ":" in pattern else {"sparsity": 0.5, "allocate": "uniform"}
    ignore = {"2x5": ["2", "4"], "2:4": ["2"], "1:4": ["2"]}.get(pattern)
    result = trim(model, mlp_batches(), pattern=pattern, scheme=scheme, ignore=ignore, **free)
    for report in result.reports:
        kept = model.get_submodule(report.name).weight != 0
        assert report.pattern == pattern
        if pattern == "per_neuron":
            assert (kept.sum(1) == kept.shape[1] - round(0.5 * kept.shape[1])).all()
        elif pattern == "neuron":
            assert int(kept.any(1).sum()) == kept.shape[0] // 2
            assert bool((kept.any(1) == kept.all(1)).all())
        elif pattern == "2x5":
            blocks = kept.reshape(15, 2, 4, 5).transpose(1, 2).flatten(2)
            assert bool((blocks.any(-1) == blocks.all(-1)).all())
            assert int(blocks.all(-1).sum()) == 30
        else:
            n, m = map(int, pattern.split(":"))
            assert (kept.reshape(kept.shape[0], -1, m).sum(-1) == n).all()


# --- prune_network


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_a_session_prunes_to_several_budgets_as_separate_calls_of_trim_do(scheme):
    model, batches = conv2d_network(), conv2d_inputs(400).split(100)
    options = {"allocate": "uniform", "scheme": scheme, "num_samples": 400, "max_rows": 400}
    session = calibrate(model, CalibrationSource(batches), PruningConfig(sparsity=0.5, **options))
    for sparsity in (0.8, 0.5, 0.8):
        budgets = session.budgets_keeping({n: round((1 - sparsity) * size) for n, size in session.sizes().items()})
        with session.restored_on_error():
            result, session = prune_network(session, budgets)
        alone = conv2d_network()
        expected = trim(alone, batches, sparsity=sparsity, **options)
        assert equal_states(model, alone)
        assert result.end_to_end_error == expected.end_to_end_error
        assert [report.local_error for report in result.reports] == [r.local_error for r in expected.reports]
