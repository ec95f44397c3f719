"""Effects of layers on the output, against their exact values, and networks in which they cannot be measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import copied_state, equal_states
from torch import nn

from lightning_nettrim import CalibrationSource, PruningConfig, trim
from lightning_nettrim.pruning.allocation import effects
from lightning_nettrim.pruning.allocation.curves import ErrorCurve, MeasuredLayer
from lightning_nettrim.pruning.allocation.effects import measure_effects
from lightning_nettrim.pruning.session_setup import calibrate

X = torch.randn(512, 12, generator=torch.Generator().manual_seed(0))


def measured(session, seed=1):
    """Every layer with random changes of its parameters, and a local error of a half."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: MeasuredLayer(
            ErrorCurve((1,), (0.0,)),
            0.5,
            {
                key: value + 0.1 * torch.randn(value.shape, generator=generator)
                for key, value in session.dense_values(name).items()
            },
        )
        for name in session.plan.layers
    }


def session_of(model):
    return calibrate(model, CalibrationSource(X.split(64)), PruningConfig(sparsity=0.5))


def test_the_effects_in_a_linear_network_are_exact_in_the_mean(monkeypatch):
    monkeypatch.setattr(effects, "DRAWS", 4096)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(12, 9, bias=False), nn.Linear(9, 7, bias=False)).double()
    model.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    session = session_of(model)
    layers = measured(session)
    first, second = (model[i].weight.detach().clone() for i in (0, 1))
    D1, D2 = layers["0"].values["0.weight"] - first, layers["1"].values["1.weight"] - second
    total, energy, x = torch.zeros(2, dtype=torch.float64), 0.0, X.double()
    for t in torch.linspace(1 / 128, 1 - 1 / 128, 64).tolist():
        A, B = first + t * D1, second + t * D2
        total += torch.stack([(x @ D1.T @ B.T).square().sum(), (x @ A.T @ D2.T).square().sum()])
        energy += float((x @ A.T @ B.T).square().sum())
    expected = 4 * total / energy  # a local error of a half
    found = measure_effects(session, layers)
    assert torch.tensor([found["0"], found["1"]]).double() / expected == pytest.approx(torch.ones(2).double(), rel=0.05)


def test_the_model_and_its_gradients_are_as_before():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7))
    model[0].weight.requires_grad_(False)
    model[2].bias.grad = torch.ones(7)
    before, session = copied_state(model), session_of(model)
    values = measure_effects(session, measured(session))
    assert all(0 < value < 100 for value in values.values())
    assert equal_states(model, before)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert model[2].bias.grad.tolist() == [1.0] * 7
    assert model[2].weight.grad is None


class TwoHeads(nn.Module):
    """A network of which only the second head is found to be the output."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(12, 9), nn.Linear(9, 3), nn.Linear(9, 5)

    def forward(self, x):
        x = self.body(x).relu()
        return self.first(x), self.second(x)


def test_a_layer_that_does_not_influence_the_output_counts_like_the_last_one():
    torch.manual_seed(4)
    session = session_of(TwoHeads())
    found = measure_effects(session, measured(session))
    assert found["first"] == 1
    assert found["second"] != 1
    result = trim(TwoHeads(), X.split(64), sparsity=0.6)
    assert all(report.sparsity < 0.9 for report in result.reports)


def test_networks_that_overflow_have_no_effects():
    torch.manual_seed(4)
    session = session_of(nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7)))
    layers = {
        name: replace(layer, values={key: 1e30 * value for key, value in layer.values.items()})
        for name, layer in measured(session).items()
    }
    assert measure_effects(session, layers) == {"0": 1.0, "2": 1.0}


class WithoutGradients(nn.Sequential):
    """A network that disables gradients."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def test_without_gradients_the_local_errors_are_used_and_the_report_says_so():
    torch.manual_seed(5)
    model = WithoutGradients(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7))
    result = trim(model, X.split(64), sparsity=0.6)
    assert result.sparsity == pytest.approx(0.6, abs=5e-3)
    (note,) = result.notes
    assert note.startswith("zeros are distributed by local errors, because the output has no gradients: ")


def test_a_batch_that_cannot_be_divided_is_used_several_times():
    torch.manual_seed(6)
    session = calibrate(
        nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7)), CalibrationSource([X]), PruningConfig(sparsity=0.5)
    )
    layers = measured(session)
    assert measure_effects(session, layers) == measure_effects(session, layers)
