"""Coresets of units: sensitivities bound what is received, nothing depends on data, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import copied_state, equal_states
from torch import nn
from unit_networks import network

from lightning_nettrim import Coreset, PruningConfig, PruningResult, compact, trim

IMPORTANCE = Coreset("importance", beta=1.0)


def pruned(name, x=None, **options):
    """A network with half of its units, its dense form, inputs and result."""
    model, own = network(name)
    dense = copy.deepcopy(model)
    options = {"sparsity": 0.5} | options
    result = trim(model, (own if x is None else x).split(64), pattern="units", **options)
    assert isinstance(result, PruningResult)
    return model, dense, own, result


def random_network(activation, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 40), activation, nn.Linear(40, 5)).double()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Identity(), nn.ELU()])
def test_the_units_are_those_of_the_formula(activation):
    """s = maxᵢ|wᵢ|·max(|φ(b + β‖w‖)|, |φ(b − β‖w‖)|), and the ten largest are kept."""
    model = random_network(activation)
    first, last = model[0], model[2]
    radius = 1.7 * first.weight.norm(dim=1)
    received = torch.stack([activation(first.bias + radius), activation(first.bias - radius)]).abs().amax(0)
    expected = (last.weight.abs().amax(0) * received).topk(10).indices.sort().values
    trim(model, [torch.randn(64, 12).double()], pattern="units", select=Coreset(beta=1.7, count=10))
    assert torch.equal((model[2].weight != 0).any(0).nonzero().squeeze(1), expected)


def test_a_batchnorm_between_is_a_part_of_the_function():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3)).eval()
    with torch.no_grad():
        model[1].running_var.uniform_(0.1, 3)
        model[1].weight.uniform_(-2, 2)
    ends = [model[0].bias + sign * model[0].weight.norm(dim=1) for sign in (1, -1)]
    received = torch.stack([model[1](end.unsqueeze(0)).relu() for end in ends]).abs().amax(0)[0]
    expected = (model[3].weight.abs().amax(0) * received).topk(6).indices.sort().values
    trim(model, [torch.randn(64, 12)], pattern="units", select=Coreset(beta=1.0, count=6), refit=False)
    assert torch.equal((model[3].weight != 0).any(0).nonzero().squeeze(1), expected)


def test_without_beta_the_largest_norm_of_the_inputs_is_used():
    model, x = random_network(nn.Sigmoid()), torch.randn(64, 12).double()
    other = copy.deepcopy(model)
    trim(model, [x], pattern="units", select=Coreset(count=10))
    trim(other, [x], pattern="units", select=Coreset(count=10, beta=float(x.norm(dim=1).amax())))
    assert equal_states(model, copied_state(other))


@pytest.mark.parametrize("name", ["chain", "flatten", "concatenation"])
def test_without_a_refit_weights_are_divided_by_the_probabilities_of_their_units(name):
    model, dense, _, _ = pruned(name, select=IMPORTANCE, refit=False)
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    scaled = 0
    for path in layers:
        new, old = model.get_submodule(path), dense.get_submodule(path)
        kept = new.weight != 0
        ratios = torch.where(kept, new.weight / old.weight, 1).detach().flatten(2 if new.weight.dim() > 2 else 1)
        assert bool((ratios >= 1 - 1e-5).all())
        assert torch.equal(new.bias, old.bias)
        per_input = ratios.amax(0) - ratios.masked_fill(~kept.flatten(2 if kept.dim() > 2 else 1), 1e9).amin(0)
        assert float(per_input.amax()) < 1e-4  # one factor for all outputs
        scaled += int((ratios > 1.01).any())
    assert scaled >= 1


def test_the_mean_over_samples_is_the_trained_response():
    model, x = random_network(nn.ReLU()), torch.randn(16, 12).double()
    x = x / x.norm(dim=1, keepdim=True)
    exact, found = model(x).detach(), []
    for seed in range(300):
        other = copy.deepcopy(model)
        select = Coreset("importance", beta=1.0, count=20, seed=seed)
        trim(other, [x], pattern="units", select=select, refit=False)
        found.append(other(x).detach())
    draws = torch.stack(found)
    error = draws.std(0) / len(found) ** 0.5
    assert bool(((draws.mean(0) - exact).abs() <= 4.5 * error).all())


@pytest.mark.parametrize("name", ["chain", "flatten", "residual", "concatenation"])
def test_a_refit_on_synthetic_inputs_reads_no_data(name):
    options = {"scheme": "parallel", "recalibrate_batchnorm": False, "select": Coreset(beta=1.0, inputs="synthetic")}
    model, dense, x, _ = pruned(name, **options)
    other, *_ = pruned(name, x=3 * torch.randn_like(x) + 1, **options)
    assert equal_states(model, copied_state(other))
    cut, *_ = pruned(name, **options, refit=False)
    assert not equal_states(model, copied_state(cut))


def test_a_refit_on_synthetic_inputs_fits_inputs_within_the_radius():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 5)).double()
    refitted, cut = copy.deepcopy(model), copy.deepcopy(model)
    select = Coreset(beta=3.0, inputs="synthetic", count=20)
    batches = torch.zeros(4096, 12).double().split(512)  # their values do not count
    trim(refitted, batches, pattern="units", select=select, scheme="parallel")
    trim(cut, batches, pattern="units", select=select, scheme="parallel", refit=False)
    x = torch.randn(500, 12).double()
    x *= 3 * torch.rand(500, 1) / x.norm(dim=1, keepdim=True)
    with torch.no_grad():
        reference = model(x)
        kept = refitted[:2](x)[:, (refitted[2].weight != 0).any(0)]
        assert kept.shape[1] == 20
        columns = torch.cat([kept, torch.ones(500, 1)], 1)
        optimal = columns @ torch.linalg.lstsq(columns, reference).solution
        assert (refitted(x) - reference).norm() < 1.1 * (optimal - reference).norm()
        assert (refitted(x) - reference).norm() < 0.7 * (cut(x) - reference).norm()


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_a_refit_on_recorded_inputs_is_better_still(name):
    model, dense, x, _ = pruned(name, select=Coreset())
    other, *_ = pruned(name, select=Coreset(inputs="synthetic", beta=1.0), scheme="parallel")
    assert (model(x) - dense(x)).norm() < 0.9 * (other(x) - dense(x)).norm()


def test_a_plan_of_a_coreset_prunes_to_the_same_network(tmp_path):
    for options in ({"select": IMPORTANCE, "refit": False}, {"select": Coreset(beta=1.0, inputs="synthetic")}):
        options |= {"sparsity": 0.5, "scheme": "parallel"}
        model, x = network("chain")
        other = copy.deepcopy(model)
        plan = trim(copy.deepcopy(model), x.split(64), pattern="units", dry_run=True, **options).plan
        (tmp_path / "plan.yaml").write_text(plan)
        trim(model, x.split(64), pattern="units", **options)
        trim(other, x.split(64), plan=tmp_path / "plan.yaml", scheme="parallel")
        assert equal_states(model, copied_state(other))


def test_the_theorem_determines_the_sizes_and_the_bound_is_reported():
    model, x = network("chain")
    result = trim(model, x.split(64), pattern="units", select=Coreset(beta=1.0, error=10.0))
    sizes = compact(model, x[:2], batch_sizes=()).report.units
    assert all(1 <= count < size for count, size in sizes.values())
    notes = [note for note in result.notes if note.startswith("coreset of")]
    assert len(notes) == 2
    assert all("total sensitivity" in note and "with a probability of 0.9" in note for note in notes)
    model, x = network("chain")
    trim(model, x.split(64), pattern="units", select=Coreset(beta=1.0, error=0.01))
    assert all(count == size for count, size in compact(model, x[:2], batch_sizes=()).report.units.values())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gated", "gate: expected units that down reads through a monotone function, such as ReLU"),
        ("depthwise", "first: expected units that are read directly, got the depthwise convolution depthwise"),
    ],
)
def test_functions_outside_the_family_are_refused(name, reason):
    model, x = network(name)
    before = copied_state(model)
    with pytest.raises(ValueError, match=reason):
        trim(model, x.split(64), pattern="units", sparsity=0.5, select=Coreset())
    assert equal_states(model, before)


def test_gelu_is_refused():
    model = random_network(nn.GELU())
    with pytest.raises(ValueError, match="Coreset: 0: expected units that 2 reads through a monotone function"):
        trim(model, [torch.randn(64, 12).double()], pattern="units", sparsity=0.5, select=Coreset())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "uniform"}, "Coreset: sampling: expected 'deterministic' or 'importance', got 'uniform'"),
        ({"inputs": "none"}, "Coreset: inputs: expected 'recorded' or 'synthetic', got 'none'"),
        ({"beta": 0.0}, "Coreset: beta: expected > 0, got 0.0"),
        ({"failure": 1.0}, r"Coreset: failure: expected a probability in \(0, 1\), got 1.0"),
        ({"count": 0}, "Coreset: count: expected at least 1, got 0"),
        ({"count": 3, "error": 1.0}, "Coreset: expected one of count and error, got 3 and 1.0: choose one"),
    ],
)
def test_unusable_coresets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Coreset(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": Coreset(count=3), "macs": 0.5}, "select: expected no budget beside Coreset.*got macs=0.5"),
        ({"select": Coreset()}, "or macs, parameters or latency with the pattern 'units', got none"),
        ({"select": "coreset", "macs": 0.5}, r"select: expected a UnitSelection, such as Coreset\(\), got 'coreset'"),
        ({"select": Coreset(inputs="synthetic"), "macs": 0.5}, "scheme: expected 'parallel' with Coreset"),
        ({"select": Coreset(), "sparsity": 0.5, "pattern": "neuron"}, "select: expected the pattern 'units'"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**{"pattern": "units"} | options)
