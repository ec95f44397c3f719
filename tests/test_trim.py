"""The whole path without Lightning: what is pruned, what is certified, and what is left untouched by bad input."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_nettrim import ADMM, LayerProblem, Magnitude, Solution, Solver, trim

QUICK = ADMM(rtol=1e-2, atol=1e-2)


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def batches(count=10, size=50, width=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(size, width, generator=generator).to(dtype) for _ in range(count)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def response(model, data):
    with torch.no_grad():
        return torch.cat([model(batch) for batch in data])


@dataclass(frozen=True)
class Failing(Solver):
    """Solves by magnitude until a layer of a given width comes, then raises."""

    error: type[BaseException] = RuntimeError
    width: int = 16

    def solve(self, problem: LayerProblem) -> Solution:
        if problem.Y.shape[-1] == self.width:
            raise self.error("planned")
        return Magnitude().solve(problem)


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("penalize_bias", [False, True])
def test_epsilon_bounds_the_response_and_the_bound_holds(scheme, penalize_bias):
    model, data = mlp(), batches()
    dense, before = response(model, data), state(model)
    result = trim(model, data, epsilon=0.1, scheme=scheme, penalize_bias=penalize_bias)
    discrepancy = float((response(model, data) - dense).norm())
    assert result.discrepancy == pytest.approx(discrepancy, rel=1e-4)
    assert 0 < result.discrepancy <= result.discrepancy_bound
    assert result.response_norm == pytest.approx(float(dense.norm()), rel=1e-5)
    assert [report.name for report in result.reports] == ["0", "2", "4"]
    for report in result.reports:
        assert report.status == "CONVERGED"
        assert report.relative_error <= 0.1 * (1 + 1e-3) or scheme == "cascade"
        assert report.relative_error <= report.epsilon * 1.001
        assert report.objective >= report.bound * (1 - 1e-3)
        assert report.sparsity > 0.1
        weight = model.get_submodule(report.name).weight
        bias = model.get_submodule(report.name).bias
        count = int((weight == 0).sum()) + (int((bias == 0).sum()) if penalize_bias else 0)
        assert report.zeros == count
    assert list(model.state_dict()) == list(before)
    assert ("0.bias" in result.masks) == penalize_bias


@pytest.mark.parametrize("solver", [QUICK, Magnitude()])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_sparsity_is_exact_in_every_layer_and_in_total(solver, scheme):
    model = mlp()
    result = trim(model, batches(), sparsity=0.7, solver=solver, scheme=scheme, per_layer={"4": {"sparsity": 0.5}})
    zeros = [round(0.7 * 600), round(0.7 * 480), round(0.5 * 64)]
    assert [report.zeros for report in result.reports] == zeros
    assert [int((model[i].weight == 0).sum()) for i in (0, 2, 4)] == zeros
    assert result.sparsity == sum(zeros) / 1144
    parameters = sum(p.numel() for p in model.parameters())
    assert result.model_sparsity == sum(zeros) / parameters
    for name, kept in result.masks.items():
        assert torch.equal(kept, model.get_parameter(name) != 0)


def test_no_sparsity_leaves_the_trained_layer():
    model = mlp()
    before = state(model)
    result = trim(model, batches(), sparsity=0.0)
    assert same(model, before)
    assert result.discrepancy == 0
    assert [report.duality_gap for report in result.reports] == [None] * 3


def test_cascade_makes_up_for_the_layers_before():
    results = {}
    for scheme in ("cascade", "parallel"):
        results[scheme] = trim(mlp(), batches(), sparsity=0.6, solver=QUICK, scheme=scheme)
    assert results["cascade"].discrepancy < results["parallel"].discrepancy


def test_the_refit_only_helps():
    errors = {}
    for refit in (True, False):
        result = trim(mlp(), batches(), epsilon=0.15, scheme="parallel", refit=refit)
        errors[refit] = [report.relative_error for report in result.reports]
        assert {report.sparsity > 0 for report in result.reports} == {True}
    assert all(with_ < without for with_, without in zip(errors[True], errors[False], strict=True))


def test_the_papers_own_solution_is_the_programs():
    model = mlp(torch.float64)
    data = batches(dtype=torch.float64)
    (report,) = trim(model, data, epsilon=0.1, refit=False, targets=["0"]).reports
    assert report.objective == pytest.approx(float(model[0].weight.detach().abs().sum()), rel=1e-9)
    assert report.relative_error <= 0.1 * (1 + 2e-3)


def test_the_same_seed_gives_the_same_network_and_another_seed_another():
    networks = []
    for seed in (0, 0, 1):
        model = mlp()
        trim(model, batches(), epsilon=0.2, num_samples=100, seed=seed, solver=QUICK)
        networks.append(state(model))
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
    assert not torch.equal(networks[0]["0.weight"], networks[2]["0.weight"])


def test_global_random_numbers_are_not_touched():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model, data = mlp(), batches()
    torch.manual_seed(5)
    trim(model, data, epsilon=0.3, solver=QUICK)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x, 0), lambda x: [x, x], lambda x: {"input": x, "y": 1}])
def test_forms_of_batches(form):
    model = mlp()
    trim(model, (form(x) for x in batches()), sparsity=0.5, solver=Magnitude())
    assert int((model[0].weight == 0).sum()) == 300


def test_leading_dimensions_and_other_layers_between():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))
    result = trim(model, [torch.randn(4, 5, 6) for _ in range(8)], epsilon=0.2)
    assert [report.status for report in result.reports] == ["CONVERGED"] * 2
    assert result.discrepancy_bound is None


def test_a_layer_called_twice_is_one_problem():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(self.a(x).relu()).relu())

    result = trim(Twice(), [torch.rand(40, 8) for _ in range(4)], epsilon=0.2)
    assert [report.name for report in result.reports] == ["a", "b"]
    assert result.discrepancy_bound is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = mlp(dtype)
    result = trim(model, batches(dtype=dtype), sparsity=0.5, solver=QUICK)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [report.sparsity for report in result.reports] == [0.5] * 3


def test_targets_and_skipped_layers():
    model = mlp()
    before = state(model)
    result = trim(model, batches(), sparsity=0.5, solver=Magnitude(), targets=["2", "4"], ignore=["4"])
    assert [report.name for report in result.reports] == ["2"]
    assert {layer.name: layer.reason for layer in result.skipped} == {"0": "not among the targets", "4": "ignored"}
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[4].weight, before["4.weight"])


def test_a_layer_that_is_never_called_is_named():
    model = mlp()
    model[0].register_module("spare", nn.Linear(3, 3))
    result = trim(model, batches(), sparsity=0.5, solver=Magnitude())
    assert [(layer.name, layer.reason) for layer in result.skipped] == [("0.spare", "never called in the forward pass")]


def test_each_layer_is_announced_and_the_table_shows_all():
    told = []
    result = trim(mlp(), batches(), sparsity=0.5, solver=QUICK, on_layer=told.append)
    assert [report.name for report in told] == ["0", "2", "4"]
    for report in result.reports:
        (line,) = [line for line in str(result).splitlines() if line.startswith(f"{report.name} ")]
        assert f"{report.sparsity:.2%}" in line
        assert report.status in line
    assert f"{result.sparsity:.2%} zeros" in str(result)


def test_results_can_be_copied_and_pickled():
    result = trim(mlp(), batches(), sparsity=0.5, solver=Magnitude())
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert other.reports == result.reports
        assert all(torch.equal(other.masks[name], mask) for name, mask in result.masks.items())


def test_the_model_can_still_be_trained_and_stays_in_its_modes():
    model = mlp()
    model[1].eval()
    with torch.inference_mode():
        trim(model, batches(), sparsity=0.5, solver=QUICK)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert hooks(model) == 0
    model(batches()[0]).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of epsilon and sparsity"),
        ({"epsilon": 0.1, "sparsity": 0.5}, "epsilon=0.1 and sparsity=0.5"),
        ({"epsilon": 0.0}, "epsilon: expected > 0.*got 0.0"),
        ({"epsilon": -1.0}, "epsilon: expected > 0.*got -1.0"),
        ({"epsilon": float("nan")}, "epsilon: expected > 0"),
        ({"sparsity": 1.0}, "sparsity: expected .*got 1.0"),
        ({"sparsity": -0.1}, "sparsity: expected .*got -0.1"),
        ({"epsilon": 0.1, "scheme": "serial"}, "scheme: expected 'cascade' or 'parallel', got 'serial'"),
        ({"epsilon": 0.1, "num_samples": 5}, "num_samples: expected at least 32, got 5"),
        ({"epsilon": 0.1, "targets": ["3"]}, "targets: '3' matches no layer"),
        ({"epsilon": 0.1, "per_layer": {"9": {"epsilon": 0.2}}}, "per_layer: '9' matches no layer"),
        ({"epsilon": 0.1, "per_layer": {"0": {"amount": 0.2}}}, r"per_layer: .*got \['amount'\]"),
        ({"epsilon": 0.1, "per_layer": {"0": {"epsilon": 0.2, "sparsity": 0.2}}}, "exactly one"),
        ({"epsilon": 0.1, "ignore": ["Linear"]}, "at least one layer to prune, got none"),
        ({"epsilon": 0.1, "solver": Magnitude()}, "expected a problem with a sparsity"),
    ],
)
def test_bad_arguments_leave_the_model_untouched(arguments, message):
    model = mlp()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        trim(model, batches(), **arguments)
    assert same(model, before)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "loader is empty"),
        (iter(()), "generator is exhausted"),
        ([torch.rand(4, 3)], r"expected batches that Sequential.forward takes, got inputs of shapes \[\(4, 3\)\]"),
        ([torch.full((40, 20), torch.nan)], "0: expected finite activations"),
        ([torch.rand(40, 20), torch.full((40, 20), torch.inf)], "0: expected finite activations"),
    ],
)
def test_bad_batches_leave_the_model_untouched(data, message):
    model = mlp()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        trim(model, data, epsilon=0.1)
    assert same(model, before)
    assert hooks(model) == 0


def test_activations_that_overflow_are_named():
    model = mlp()
    with torch.no_grad():
        model[2].weight.fill_(3e38)
    before = state(model)
    with pytest.raises(ValueError, match="2: expected finite activations"):
        trim(model, batches(), epsilon=0.1)
    assert same(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("width", [30, 16, 4])
def test_an_interruption_gives_every_layer_its_trained_weights_and_says_so(error, scheme, width, caplog):
    model = mlp()
    before = state(model)
    with caplog.at_level(logging.WARNING), pytest.raises(error):
        trim(model, batches(), sparsity=0.5, solver=Failing(error, width), scheme=scheme)
    assert same(model, before)
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())
    name = {30: "0", 16: "2", 4: "4"}[width]
    assert f"{error.__name__} while solving {name}: all of 0, 2, 4 have their trained weights again" in caplog.text


def test_dead_neurons_and_dead_inputs():
    model, data = mlp(), batches()
    with torch.no_grad():
        model[0].bias[:5] = -100
        model[2].bias[:] = -100
        for batch in data:
            batch[:, :4] = 0
    result = trim(model, data, epsilon=0.1)
    assert [report.status for report in result.reports] == ["CONVERGED"] * 3
    assert int(model[0].weight[:5].count_nonzero()) == 0
    assert int(model[0].weight[:, :4].count_nonzero()) == 0
    assert int(model[2].weight.count_nonzero()) == 0
