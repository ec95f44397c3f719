"""Recorded inputs and outputs of layers."""

from __future__ import annotations

import pytest
import torch
from networks import ConvBlock, SharedLayers, count_hooks
from torch import nn
from torch.nn import functional as F

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.recording import record
from lightning_nettrim.core.activation import Rectifier
from lightning_nettrim.layers import find_layers
from lightning_nettrim.layers.context import LayerContext


class Net(nn.Module):
    """Two Linear layers with an activation between them that may overwrite its input."""

    def __init__(self, activation):
        super().__init__()
        self.a, self.b, self.norm, self.activation = nn.Linear(6, 5), nn.Linear(5, 3), nn.BatchNorm1d(5), activation

    def forward(self, x):
        return self.b(self.activation(self.a(x)))


def relu_of_a_view(y):
    y.view(-1).relu_()
    return y


def batches_of(x, size):
    return [CalibrationBatch(part) for part in x.split(size)]


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), relu_of_a_view, F.relu], ids=["module", "view", "relu"])
def test_outputs_are_recorded_before_an_activation_overwrites_them(activation):
    net, x = Net(activation), torch.randn(30, 6)
    with evaluation_mode(net):
        recordings = record(net, find_layers(net)[0], batches_of(x, 7), num_samples=100, seed=0)
    with torch.no_grad():
        Z = torch.cat([net.a(part) for part in x.split(7)])
    assert torch.equal(recordings["a"].X, x)
    assert torch.equal(recordings["a"].Z, Z)
    assert torch.equal(recordings["b"].X, Z.relu())


def test_leading_dimensions_are_rows_which_are_bounded_and_aligned():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(50, 7, 3)
    layers, batches = find_layers(net)[0], batches_of(x, 8)
    with evaluation_mode(net):
        recordings = record(net, layers, batches, num_samples=64, seed=0)
        again = record(net, {"2": layers["2"]}, batches, outputs=(), num_samples=64, seed=0)
    assert recordings["0"].total_rows == 350
    assert recordings["0"].rows == 64
    assert tuple(recordings["0"].X.shape) == (64, 3)
    assert torch.equal(recordings["0"].Z.relu(), recordings["2"].X)
    assert torch.equal(again["2"].X, recordings["2"].X)
    assert again["2"].Z is None


def test_repeated_and_shared_layers_record_the_rows_of_all_calls():
    model, x = SharedLayers().eval(), torch.randn(50, 3, 6, 6)
    layers = find_layers(model)[0]
    with evaluation_mode(model):
        recordings = record(model, layers, [CalibrationBatch(x)], num_samples=10**6, seed=0)
    assert recordings["conv"].total_rows == 50 * (36 + 9)
    assert recordings["a"].total_rows == 2 * 50


@pytest.mark.parametrize("rows", [10**5, 100])
def test_the_residual_is_recorded_at_the_same_positions(rows):
    model, x = ConvBlock(True).double().eval(), torch.randn(20, 4, 6, 6).double()
    layers, contexts = {"conv": find_layers(model)[0]["conv"]}, {"conv": LayerContext(1, "norm", 1, Rectifier())}
    with evaluation_mode(model):
        recording = record(model, layers, batches_of(x, 7), contexts=contexts, num_samples=rows, seed=0)["conv"]
        shortcut = model.shortcut(x).movedim(1, -1).flatten(0, -2)
        outputs = model.conv(x).movedim(1, -1).flatten(0, -2)
    assert recording.rows == min(rows, 320)
    positions = (recording.Z.unsqueeze(1) - outputs).norm(dim=-1).argmin(1)
    torch.testing.assert_close(recording.Z, outputs[positions])
    torch.testing.assert_close(recording.R, shortcut[positions])
    assert count_hooks(model) == 0


def test_a_missing_residual_sum_is_an_error():
    net = nn.Sequential(nn.Linear(3, 3))
    with evaluation_mode(net), pytest.raises(ValueError, match="0: expected a residual sum after it"):
        record(
            net, find_layers(net)[0], [CalibrationBatch(torch.ones(2, 3))], contexts={"0": LayerContext(1, None, 1)},
            num_samples=9, seed=0,
        )  # fmt: skip
    assert count_hooks(net) == 0


def test_the_rest_of_a_forward_pass_is_skipped():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            self.a(x)
            raise RuntimeError("reached")

    net = Failing()
    with evaluation_mode(net):
        layers, contexts = {"a": find_layers(net)[0]["a"]}, {"a": LayerContext(1)}
        recordings = record(
            net, layers, [CalibrationBatch(torch.ones(2, 3))], contexts=contexts, num_samples=9, seed=0, stop=True
        )
    assert len(recordings["a"].X) == 2


def test_layers_that_are_not_called_are_left_out():
    net = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    batch = CalibrationBatch(torch.ones(2, 3), lambda model, x: model["used"](x))
    with evaluation_mode(net):
        assert list(record(net, find_layers(net)[0], [batch], num_samples=9, seed=0)) == ["used"]


def test_after_an_error_the_model_has_its_modes_and_no_hooks():
    net = Net(F.relu)
    net.norm.eval()
    modes = [module.training for module in net.modules()]
    with pytest.raises(RuntimeError), evaluation_mode(net):  # noqa: PT012
        assert not any(module.training for module in net.modules())
        record(net, find_layers(net)[0], [CalibrationBatch(torch.ones(2, 99))], num_samples=9, seed=0)
    assert [module.training for module in net.modules()] == modes
    assert count_hooks(net) == 0
