"""Recording, and finding the ReLU that follows a layer by watching a batch flow."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.recording import record
from lightning_nettrim.calibration.tracing import trace_forward
from lightning_nettrim.layers import find_layers
from lightning_nettrim.layers.context import LayerContext


class Net(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 5), nn.Linear(5, 3), between
        self.relu, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)
        self.dropout, self.norm, self.other = nn.Dropout(0.5), nn.BatchNorm1d(5), torch.randn(4, 5)

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


def twice(net, y):
    return y.relu() + net.a(y.relu().repeat(1, 2)[:, :6]).relu()


def inplace_view(net, y):
    y.view(-1).relu_()
    return y


RELU = {
    "module": lambda net, y: net.relu(y),
    "module in place": lambda net, y: net.inplace(y),
    "F.relu": lambda net, y: F.relu(y),
    "F.relu in place": lambda net, y: F.relu(y, inplace=True),
    "torch.relu": lambda net, y: torch.relu(y),
    "Tensor.relu": lambda net, y: y.relu(),
    "Tensor.relu_": lambda net, y: y.relu_(),
    "clamp": lambda net, y: y.clamp(min=0),
    "clamp_": lambda net, y: y.clamp_(min=0.0),
    "torch.clamp_min": lambda net, y: torch.clamp_min(y, 0),
    "behind dropout": lambda net, y: net.dropout(y).relu(),
    "behind views": lambda net, y: y.unflatten(1, (5, 1)).flatten(1).unsqueeze(0).squeeze(0).relu(),
    "twice the same": lambda net, y: y.relu() + F.relu(y),
    "view in place": inplace_view,
    "called twice": twice,
}
LINEAR = {
    "nothing": lambda net, y: y,
    "gelu": lambda net, y: F.gelu(y),
    "steep leaky": lambda net, y: F.leaky_relu(y, 1.5),
    "residual around": lambda net, y: y + y.relu(),
    "batch norm by the batch": lambda net, y: F.batch_norm(y, None, None, training=True).relu(),
    "batch norm beside": lambda net, y: net.norm(y).relu() + y,
    "a number added": lambda net, y: (y + 1).relu(),
    "itself added": lambda net, y: (y + y).relu(),
    "added twice over": lambda net, y: torch.add(y, net.other, alpha=2).relu(),
    "negated": lambda net, y: (-y).relu(),
    "average pooling before": lambda net, y: F.avg_pool1d(y.unsqueeze(1), 5).expand(-1, 5, 1).squeeze(-1).relu(),
}
OTHERS = {
    "leaky": (lambda net, y: F.leaky_relu(y), "LeakyReLU"),
    "prelu": (lambda net, y: F.prelu(y, torch.linspace(0, 1, 5)), "PReLU"),
    "relu6": (lambda net, y: F.relu6(y), "clamp to [0, 6]"),
    "hardtanh": (lambda net, y: F.hardtanh(y, -2, 2), "clamp to [-2, 2]"),
    "hardtanh in place": (lambda net, y: F.hardtanh_(y), "clamp to [-1, 1]"),
    "clamp below": (lambda net, y: y.clamp(min=-1), "clamp to [-1, inf]"),
    "clamp both": (lambda net, y: y.clamp(0, 1), "clamp to [0, 1]"),
    "batch norm": (lambda net, y: net.norm(y), "BatchNorm, linear"),
    "batch norm, then relu": (lambda net, y: net.norm(y).relu(), "BatchNorm, ReLU"),
    "a view before batch norm": (lambda net, y: net.norm(y.view(-1, 5)).relu(), "linear"),
    "batch norm, then gelu": (lambda net, y: F.gelu(net.norm(y)), "BatchNorm, linear"),
    "residual sum": (lambda net, y: y + net.other, "sum, linear"),
    "residual sum, then relu": (lambda net, y: (net.other + y).relu(), "sum, ReLU"),
    "in place": (lambda net, y: y.add_(net.other).relu_(), "sum, ReLU"),
    "batch norm, two sums, relu6": (
        lambda net, y: F.relu6(net.norm(y) + net.other + net.other),
        "BatchNorm, sum, sum, clamp to [0, 6]",
    ),
    "max pooling between": (lambda net, y: F.max_pool1d(y.unsqueeze(1), 1).squeeze(1).relu(), "ReLU"),
    "two rectifiers": (lambda net, y: y.relu() + F.relu6(y), "linear"),
    "read between": (lambda net, y: (y + net.other).relu() + (y + net.other), "linear"),
}


def contexts(net, x):
    with evaluation_mode(net):
        return trace_forward(net, find_layers(net)[0], [CalibrationBatch(x)]).contexts


@pytest.mark.parametrize("between", RELU.values(), ids=RELU.keys())
def test_a_relu_is_seen(between):
    found = contexts(Net(between), torch.randn(4, 6))
    assert str(found["a"]) == "ReLU"
    assert str(found["b"]) == "linear"


@pytest.mark.parametrize("between", LINEAR.values(), ids=LINEAR.keys())
def test_anything_else_is_linear(between):
    assert str(contexts(Net(between), torch.randn(4, 6))["a"]) == "linear"


@pytest.mark.parametrize(("between", "follows"), OTHERS.values(), ids=OTHERS.keys())
def test_what_follows_is_seen(between, follows):
    assert str(contexts(Net(between), torch.randn(4, 6))["a"]) == follows


def test_a_response_that_is_also_returned_is_linear():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 5)

        def forward(self, x):
            y = self.a(x)
            return y, {"relu": y.relu()}

    net = Both()
    with evaluation_mode(net):
        found = trace_forward(net, find_layers(net)[0], [CalibrationBatch(torch.randn(4, 6))])
    assert str(found.contexts["a"]) == "linear"


def test_calls_and_order_are_those_of_the_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.first(self.first(x).relu()).relu())

    net = Backwards()
    found = trace_forward(net, find_layers(net)[0], [CalibrationBatch(torch.ones(2, 4))]).contexts
    assert list(found) == ["first", "last"]
    assert [flow.calls for flow in found.values()] == [2, 1]
    assert str(found["first"]) == "ReLU"


@pytest.mark.parametrize("between", [RELU["module in place"], RELU["view in place"], RELU["Tensor.relu"]])
def test_a_tape_holds_what_went_in_and_what_came_out_before_the_relu(between):
    net, x = Net(between), torch.randn(30, 6)
    with evaluation_mode(net):
        recordings = record(net, find_layers(net)[0], [CalibrationBatch(p) for p in x.split(7)], num_samples=100, seed=0)
    with torch.no_grad():
        Z = torch.cat([net.a(p) for p in x.split(7)])
    assert torch.equal(recordings["a"].X, x)
    assert torch.equal(recordings["a"].Z, Z)
    assert torch.equal(recordings["b"].X, Z.relu())


def test_leading_dimensions_are_rows_and_rows_are_bounded_and_aligned():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(50, 7, 3)
    layers = find_layers(net)[0]
    held = [CalibrationBatch(p) for p in x.split(8)]
    with evaluation_mode(net):
        recordings = record(net, layers, held, num_samples=64, seed=0)
        again = record(net, {"2": layers["2"]}, held, outputs=(), num_samples=64, seed=0)
    assert recordings["0"].seen == 350
    assert tuple(recordings["0"].X.shape) == (64, 3)
    assert torch.equal(recordings["0"].Z.relu(), recordings["2"].X)
    assert torch.equal(again["2"].X, recordings["2"].X)
    assert again["2"].Z is None


def test_the_rest_of_a_forward_pass_is_skipped():
    class Guarded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            self.a(x)
            raise RuntimeError("reached")

    net = Guarded()
    with evaluation_mode(net):
        layers, contexts = {"a": find_layers(net)[0]["a"]}, {"a": LayerContext(1)}
        recordings = record(
            net, layers, [CalibrationBatch(torch.ones(2, 3))], contexts=contexts, num_samples=9, seed=0, stop=True
        )
    assert len(recordings["a"].X) == 2


def test_afterwards_the_model_is_as_it_was():
    net = Net(RELU["module"])
    net.norm.eval()
    modes = [module.training for module in net.modules()]
    with pytest.raises(RuntimeError), evaluation_mode(net):  # noqa: PT012
        assert not any(module.training for module in net.modules())
        record(net, find_layers(net)[0], [CalibrationBatch(torch.ones(2, 99))], num_samples=9, seed=0)
    assert [module.training for module in net.modules()] == modes
    assert all(not module._forward_hooks for module in net.modules())


def test_a_batch_that_the_model_refuses_is_named():
    net = Net(RELU["module"])
    with pytest.raises(ValueError, match=r"Net.forward takes, got inputs of shapes \[\(2, 99\)\]"):
        trace_forward(net, find_layers(net)[0], [CalibrationBatch(torch.ones(2, 99))])
    assert all(not module._forward_hooks for module in net.modules())
