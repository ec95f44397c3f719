"""The whole path without Lightning: what is pruned, what is certified, and what is left untouched by bad input."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import dataclass

import pytest
import torch
import yaml
from torch import nn

from lightning_nettrim import ADMM, Cardinality, LayerProblem, Magnitude, Solution, Solver, SparseGPT, Wanda, trim

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
    assert 0 < result.discrepancy <= result.end_to_end_bound
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
    result = trim(
        model,
        batches(),
        sparsity=0.7,
        allocate="uniform",
        solver=solver,
        scheme=scheme,
        per_layer={"4": {"sparsity": 0.5}},
    )
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
        results[scheme] = trim(mlp(), batches(), sparsity=0.6, allocate="uniform", solver=QUICK, scheme=scheme)
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
    trim(model, (form(x) for x in batches()), sparsity=0.5, allocate="uniform", solver=Magnitude())
    assert int((model[0].weight == 0).sum()) == 300


def test_leading_dimensions_and_other_layers_between():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))
    result = trim(model, [torch.randn(4, 5, 6) for _ in range(8)], epsilon=0.2)
    assert [report.status for report in result.reports] == ["CONVERGED"] * 2
    assert result.end_to_end_bound is None


def test_a_layer_called_twice_is_one_problem():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(self.a(x).relu()).relu())

    result = trim(Twice(), [torch.rand(40, 8) for _ in range(4)], epsilon=0.2)
    assert [report.name for report in result.reports] == ["a", "b"]
    assert result.end_to_end_bound is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = mlp(dtype)
    result = trim(model, batches(dtype=dtype), sparsity=0.5, allocate="uniform", solver=QUICK)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [report.sparsity for report in result.reports] == [0.5] * 3


def test_targets_and_skipped_layers():
    model = mlp()
    before = state(model)
    result = trim(
        model, batches(), sparsity=0.5, allocate="uniform", solver=Magnitude(), targets=["2", "4"], ignore=["4"]
    )
    assert [report.name for report in result.reports] == ["2"]
    assert {layer.name: layer.reason for layer in result.skipped} == {"0": "not among the targets", "4": "ignored"}
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[4].weight, before["4.weight"])


def test_a_layer_that_is_never_called_is_named():
    model = mlp()
    model[0].register_module("spare", nn.Linear(3, 3))
    result = trim(model, batches(), sparsity=0.5, allocate="uniform", solver=Magnitude())
    assert [(layer.name, layer.reason) for layer in result.skipped] == [("0.spare", "never called in the forward pass")]


def test_each_layer_is_announced_and_the_table_shows_all():
    told = []
    result = trim(mlp(), batches(), sparsity=0.5, allocate="uniform", solver=QUICK, on_layer=told.append)
    assert [report.name for report in told] == ["0", "2", "4"]
    for report in result.reports:
        (line,) = [line for line in str(result).splitlines() if line.startswith(f"{report.name} ")]
        assert f"{report.sparsity:.2%}" in line
        assert report.status in line
    assert f"{result.sparsity:.2%} zeros" in str(result)


def test_results_can_be_copied_and_pickled():
    result = trim(mlp(), batches(), sparsity=0.5, allocate="uniform", solver=Magnitude())
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert other.reports == result.reports
        assert all(torch.equal(other.masks[name], mask) for name, mask in result.masks.items())


def test_the_model_can_still_be_trained_and_stays_in_its_modes():
    model = mlp()
    model[1].eval()
    with torch.inference_mode():
        trim(model, batches(), sparsity=0.5, allocate="uniform", solver=QUICK)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert hooks(model) == 0
    model(batches()[0]).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected one of sparsity, epsilon, max_drop, plan"),
        ({"epsilon": 0.1, "sparsity": 0.5}, "got sparsity=0.5 and epsilon=0.1"),
        ({"epsilon": 0.0}, "epsilon: expected > 0.*got 0.0"),
        ({"epsilon": -1.0}, "epsilon: expected > 0.*got -1.0"),
        ({"epsilon": float("nan")}, "epsilon: expected > 0"),
        ({"sparsity": 1.0}, "sparsity: expected .*got 1.0"),
        ({"sparsity": -0.1}, "sparsity: expected .*got -0.1"),
        ({"epsilon": 0.1, "scheme": "serial"}, "scheme: expected 'cascade' or 'parallel', got 'serial'"),
        ({"epsilon": 0.1, "num_samples": 5}, "num_samples: expected at least 32, got 5"),
        ({"sparsity": "0.5"}, "sparsity: expected a number, got '0.5'"),
        ({"epsilon": 0.1, "max_memory": "3"}, "max_memory: expected a number, got '3'"),
        ({"epsilon": 0.1, "targets": ["3"]}, "targets: '3' matches no layer"),
        ({"epsilon": 0.1, "per_layer": {"9": {"epsilon": 0.2}}}, "per_layer: '9' matches no layer"),
        ({"epsilon": 0.1, "per_layer": {"0": {"amount": 0.2}}}, r"per_layer: .*got \['amount'\]"),
        (
            {"epsilon": 0.1, "per_layer": {"0": {"epsilon": 0.2, "sparsity": 0.2}}},
            "expected one of epsilon and sparsity for a layer",
        ),
        ({"epsilon": 0.1, "ignore": ["Linear"]}, "at least one layer to prune, got none"),
        ({"pattern": "2:3"}, "0: pattern '2:3': expected a multiple of 3 inputs, got 20"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "pattern '2:4': expected no budget but its own 0.5, got sparsity=0.4"),
        ({"epsilon": 0.4, "pattern": "2:4"}, "pattern '2:4': expected no budget but its own 0.5, got epsilon=0.4"),
        ({"sparsity": 0.5, "solver": "Wanda"}, r"solver: expected a Solver, such as Cardinality\(\), got 'Wanda'"),
        ({"epsilon": 0.4, "pattern": "neuron"}, "pattern 'neuron': expected a sparsity, got epsilon=0.4"),
        ({"sparsity": 0.5, "pattern": "rows"}, "pattern: expected .* got 'rows'"),
        ({"sparsity": 0.5, "pattern": "neuron", "penalize_bias": True}, "penalize_bias: expected a pattern of single"),
        ({"sparsity": 0.5, "allocate": "best"}, "allocate: expected 'uniform' or .* got 'best'"),
        ({"sparsity": 0.5, "importance": "high"}, "importance: expected 'outgoing' or 'equal', got 'high'"),
        ({"max_drop": 0.1}, "expected max_drop and metric together"),
        ({"max_drop": 0.1, "sparsity": 0.5}, "max_drop: expected no epsilon, sparsity or n:m pattern"),
        ({"max_drop": 0.1, "metric": float, "per_layer": {"Linear": {"sparsity": 0.5}}}, "a layer without a budget"),
        ({"max_drop": -0.1, "metric": float}, "max_drop: expected ≥ 0 .* got -0.1"),
        ({"max_drop": 0.1, "metric": float, "mode": "up"}, "mode: expected 'max' or 'min', got 'up'"),
        ({"max_drop": 0.1, "metric": float, "dry_run": True}, "dry_run: .* got max_drop"),
        ({"sparsity": 0.5, "per_layer": {"0": {"min_sparsity": 0.9, "max_sparsity": 0.1}}}, "0 ≤ min ≤ max"),
        ({"sparsity": 0.5, "per_layer": {"Linear": {"max_sparsity": 0.4}}}, "weights to be kept .* got 572"),
        ({"sparsity": 0.5, "plan": "plan.yaml"}, "plan: expected no epsilon, sparsity or max_drop beside it"),
        ({"plan": "nowhere.yaml"}, "plan: expected a plan.yaml .* got nowhere.yaml"),
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
        trim(model, batches(), sparsity=0.5, allocate="uniform", solver=Failing(error, width), scheme=scheme)
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


# --- sparsity over the whole network


ALLOCATIONS = ["uniform", "global", "epsilon", "magnitude"]


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.4, 0.777, 0.95])
def test_the_total_is_exact_to_the_weight_whatever_the_allocation(allocate, sparsity):
    model = mlp()
    result = trim(model, batches(), sparsity=sparsity, allocate=allocate)
    assert sum(report.zeros for report in result.reports) == round(sparsity * 1144)
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 2, 4)) == round(sparsity * 1144)


@pytest.mark.parametrize("allocate", ALLOCATIONS)
def test_layers_with_a_budget_of_their_own_and_bounds_are_left_to_them(allocate):
    own = {"0": {"sparsity": 0.25}, "2": {"max_sparsity": 0.55}, "4": {"min_sparsity": 0.5}}
    result = trim(mlp(), batches(), sparsity=0.5, allocate=allocate, per_layer=own)
    first, second, third = (report.zeros for report in result.reports)
    assert first == 150
    assert second + third == 272
    assert second <= round(0.55 * 480)
    assert third >= 32


def test_the_global_allocation_changes_the_output_least():
    discrepancies = {}
    for allocate in ("uniform", "global", "epsilon"):
        discrepancies[allocate] = trim(mlp(), batches(), sparsity=0.7, allocate=allocate).discrepancy
    assert discrepancies["global"] == min(discrepancies.values())


@pytest.mark.parametrize("pattern", ["per_neuron", "2:4", "1:4", "neuron", "2x5"])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_patterns_hold_in_the_modules_own_weights(pattern, scheme):
    model = mlp()
    free = {} if ":" in pattern else {"sparsity": 0.5, "allocate": "uniform"}
    ignore = {"2x5": ["2", "4"], "2:4": ["2"], "1:4": ["2"]}.get(pattern)
    result = trim(model, batches(), pattern=pattern, scheme=scheme, ignore=ignore, **free)
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


def test_a_pattern_can_be_one_layers_own():
    model = mlp()
    result = trim(model, batches(), sparsity=0.6, allocate="uniform", per_layer={"2": {"pattern": "1:2"}})
    assert [report.sparsity for report in result.reports] == [0.6, 0.5, pytest.approx(0.6, abs=0.01)]
    assert (model[2].weight.reshape(16, 15, 2) != 0).sum(-1).eq(1).all()


@pytest.mark.parametrize("solver", [None, Magnitude(), Wanda(), SparseGPT()], ids=repr)
def test_methods_that_take_a_sparsity_take_an_epsilon_too(solver):
    model, data = mlp(), batches()
    chosen = {"solver": solver or Cardinality()}
    result = trim(model, data, epsilon=0.1, scheme="parallel", **chosen)
    assert all(0 < report.relative_error <= 0.1 for report in result.reports)
    if solver is None:
        convex = trim(mlp(), data, epsilon=0.1, scheme="parallel")
        assert result.sparsity > convex.sparsity


def test_the_fewest_weights_within_an_epsilon_can_have_a_pattern():
    model = mlp()
    trim(model, batches(), epsilon=0.2, solver=Cardinality(), pattern="per_neuron", targets=["0"])
    kept = (model[0].weight != 0).sum(1)
    assert 0 < int(kept[0]) < 20
    assert (kept == kept[0]).all()


def test_importance_is_found_where_one_layer_reads_another():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(20, 30), nn.Linear(30, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.c(torch.tanh(self.b(self.a(x).relu())))

    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.b.weight[:, 15:] *= 1e-3  # the later half of a's neurons is hardly read
    trim(model, batches(), sparsity=0.7, allocate="uniform")
    kept = (model.a.weight != 0).sum(1).float()
    assert kept[:15].mean() > 2 * kept[15:].mean()
    torch.manual_seed(0)
    equal = Net()
    with torch.no_grad():
        equal.b.weight[:, 15:] *= 1e-3
    trim(equal, batches(), sparsity=0.7, allocate="uniform", importance="equal")
    kept = (equal.a.weight != 0).sum(1).float()
    assert kept[:15].mean() < 1.5 * kept[15:].mean()


# --- plans


def test_a_plan_is_read_back_and_prunes_the_same(tmp_path):
    options = {"ignore": ["4"], "per_layer": {"2": {"pattern": "1:2"}}}
    model = mlp()
    before = state(model)
    dry = trim(model, batches(), sparsity=0.6, dry_run=True, **options)
    assert same(model, before)
    assert dry.reports == ()
    path = tmp_path / "plan.yaml"
    path.write_text(dry.plan)
    one, other = mlp(), mlp()
    trim(one, batches(), sparsity=0.6, **options)
    trim(other, batches(), plan=path)
    assert same(other, state(one))
    assert torch.equal(other[4].weight, mlp()[4].weight)


def test_an_edited_plan_is_followed(tmp_path):
    dry = yaml.safe_load(trim(mlp(), batches(), sparsity=0.6, dry_run=True).plan)
    dry["layers"]["0"]["sparsity"] = 0.25
    del dry["layers"]["2"]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(dry))
    model = mlp()
    result = trim(model, batches(), plan=path)
    assert [report.name for report in result.reports] == ["0", "4"]
    assert result.reports[0].sparsity == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: {'9': {sparsity: 0.5}}", "plan: expected layers of this model, got '9'"),
        ("layers: {'0': {sparsity: 0.5, shape: [3, 3]}}", r"plan: 0: expected shape \[30, 20\], got \[3, 3\]"),
        ("layers: {'0': {sparsity: 1.5}}", "sparsity: expected .* got 1.5"),
        ("layers: {'0': {amount: 0.5}}", "per_layer: expected the options .* got .'amount'"),
        ("layers: [", "plan: expected a plan.yaml"),
        ("{}", "plan: expected a plan.yaml"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(tmp_path, text, message):
    path, model = tmp_path / "plan.yaml", mlp()
    path.write_text(text)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        trim(model, batches(), plan=path)
    assert same(model, before)


# --- a tolerance


def agreement(model, data):
    dense = response(model, data)
    dense = dense - dense.mean(0)
    return lambda: 1 - float((response(model, data) - response(model, data).mean(0) - dense).norm() / dense.norm())


def test_the_sparsest_network_within_the_drop_is_found():
    model, data, told = mlp(), batches(), []
    metric = agreement(model, data)
    result = trim(model, data, max_drop=0.3, metric=metric, on_trial=told.append)
    assert metric() >= 0.7
    within = [trial for trial in result.trials if trial.within]
    assert within[0].sparsity == 0.0
    assert within[0].metric == 1.0
    best = max(trial.sparsity for trial in within)
    assert best > 0.3
    assert result.sparsity == pytest.approx(best, abs=1e-3)
    assert list(result.trials[1:]) == told
    assert any(not trial.within for trial in result.trials)
    assert "sparsity" in result.plan


def test_a_drop_can_be_relative_and_a_metric_small_at_its_best():
    model, data = mlp(), batches()
    dense = response(model, data)

    def loss():
        return 10 + float((response(model, data) - dense).norm() / dense.norm())

    result = trim(model, data, max_drop=0.01, metric=loss, mode="min", relative=True)
    assert loss() <= 10.1
    assert all(trial.within == (trial.metric <= 10.1) for trial in result.trials)
    assert result.sparsity > 0.2


def test_where_none_is_within_the_model_is_as_trained():
    model, data = mlp(), batches()
    before = state(model)
    result = trim(model, data, max_drop=0.0, metric=lambda: float(same(model, before)))
    assert same(model, before)
    assert result.sparsity == 0
    assert [trial.within for trial in result.trials] == [True] + [False] * (len(result.trials) - 1)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_an_interrupted_search_leaves_the_model_as_trained(error, when, caplog):
    model = mlp()
    before, calls = state(model), []

    def metric():
        calls.append(None)
        if len(calls) > when:
            raise error("planned")
        return 1.0

    with caplog.at_level(logging.WARNING), pytest.raises(error, match="planned"):
        trim(model, batches(), max_drop=0.1, metric=metric)
    assert same(model, before)
    assert hooks(model) == 0
    assert "have their trained weights again" in caplog.text


def test_a_subclass_of_linear_keeps_the_certificate_of_the_network():
    class Own(nn.Linear):
        """A Linear by another name."""

    plain, own = mlp(), mlp()
    own[2] = Own(30, 16)
    own[2].load_state_dict(plain[2].state_dict())
    bounds = [trim(model, batches(), epsilon=0.2, solver=QUICK).end_to_end_bound for model in (plain, own)]
    assert bounds[0] == bounds[1] > 0
