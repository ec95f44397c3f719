"""Effects of layers on the output: exact values, and layers whose effect is unknown."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import copied_state, equal_states
from torch import nn

from lightning_nettrim import CalibrationSource, PruningConfig, trim
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


def exact_effects(first, second, layers, x):
    """Of a linear network of two layers, for a local error of a half."""
    D1, D2 = layers["0"].values["0.weight"] - first, layers["1"].values["1.weight"] - second
    A, B = first + D1 / 2, second + D2 / 2
    changes = (x @ D1.T @ B.T, x @ A.T @ D2.T)
    return [4 * float(change.square().sum() / (x @ A.T @ B.T).square().sum()) for change in changes]


@pytest.mark.parametrize("batches", [X[:400].split(100), [X[:400]], X[:400].split(7)], ids=len)
def test_the_effects_in_a_linear_network_are_exact(batches):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(12, 9, bias=False), nn.Linear(9, 7, bias=False)).double()
    first, second = (model[i].weight.detach().clone() for i in (0, 1))
    source = CalibrationSource([batch.double() for batch in batches])
    session = calibrate(model, source, PruningConfig(sparsity=0.5))
    layers = measured(session)
    found = measure_effects(session, layers)
    assert [found["0"], found["1"]] == pytest.approx(exact_effects(first, second, layers, X[:400].double()), rel=1e-9)


def test_effects_are_measured_on_as_many_inputs_as_give_the_last_layer_512_rows():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(12, 9, bias=False), nn.Linear(9, 7, bias=False)).double()
    first, second = (model[i].weight.detach().clone() for i in (0, 1))
    data = torch.randn(4096, 12, dtype=torch.float64)
    session = calibrate(model, CalibrationSource(data.split(128)), PruningConfig(sparsity=0.5, num_samples=4096))
    layers = measured(session)
    found = measure_effects(session, layers)
    assert [found["0"], found["1"]] == pytest.approx(exact_effects(first, second, layers, data[:512]), rel=1e-9)


def test_the_model_is_as_before():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7))
    before, session = copied_state(model), session_of(model)
    values = measure_effects(session, measured(session))
    assert all(0 < value < 100 for value in values.values())
    assert equal_states(model, before)


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
