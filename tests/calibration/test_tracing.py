"""Tracing finds what follows a layer from the operations of a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.tracing import trace_forward
from lightning_nettrim.layers import find_layers


class Net(nn.Module):
    """Two Linear layers with a function between them."""

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
    "after dropout": lambda net, y: net.dropout(y).relu(),
    "after views": lambda net, y: y.unflatten(1, (5, 1)).flatten(1).unsqueeze(0).squeeze(0).relu(),
    "two equal relus": lambda net, y: y.relu() + F.relu(y),
    "view in place": inplace_view,
    "called twice": twice,
}
LINEAR = {
    "nothing": lambda net, y: y,
    "gelu": lambda net, y: F.gelu(y),
    "steep leaky": lambda net, y: F.leaky_relu(y, 1.5),
    "residual around the relu": lambda net, y: y + y.relu(),
    "batch norm by the batch": lambda net, y: F.batch_norm(y, None, None, training=True).relu(),
    "batch norm, also read before": lambda net, y: net.norm(y).relu() + y,
    "a number added": lambda net, y: (y + 1).relu(),
    "also read in a list": lambda net, y: y.relu() + torch.cat([net.other, y], 1)[:, 5:],
    "itself added": lambda net, y: (y + y).relu(),
    "added with a factor": lambda net, y: torch.add(y, net.other, alpha=2).relu(),
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
def test_a_relu_is_found(between):
    found = contexts(Net(between), torch.randn(4, 6))
    assert str(found["a"]) == "ReLU"
    assert str(found["b"]) == "linear"


@pytest.mark.parametrize("between", LINEAR.values(), ids=LINEAR.keys())
def test_the_response_is_linear_otherwise(between):
    assert str(contexts(Net(between), torch.randn(4, 6))["a"]) == "linear"


@pytest.mark.parametrize(("between", "description"), OTHERS.values(), ids=OTHERS.keys())
def test_other_operations_are_found(between, description):
    assert str(contexts(Net(between), torch.randn(4, 6))["a"]) == description


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


def test_layers_are_in_order_of_execution_with_their_calls():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.first(self.first(x).relu()).relu())

    net = Backwards()
    found = trace_forward(net, find_layers(net)[0], [CalibrationBatch(torch.ones(2, 4))]).contexts
    assert list(found) == ["first", "last"]
    assert [context.calls for context in found.values()] == [2, 1]
    assert str(found["first"]) == "ReLU"


def test_the_shapes_of_a_batch_that_the_model_refuses_are_named():
    net = Net(RELU["module"])
    with pytest.raises(ValueError, match=r"Net.forward takes, got inputs of shapes \[\(2, 99\)\]"):
        trace_forward(net, find_layers(net)[0], [CalibrationBatch(torch.ones(2, 99))])
    assert all(not module._forward_hooks for module in net.modules())


def test_rows_and_batchnorms_are_in_the_trace():
    net, x = Net(lambda net, y: net.norm(y).relu()), torch.randn(30, 6)
    with evaluation_mode(net):
        trace = trace_forward(net, find_layers(net)[0], [CalibrationBatch(part) for part in x.split(8)])
    assert trace.rows == {"a": 30, "b": 30}
    assert trace.batchnorms == {"norm": "a"}
    assert trace.described() == {"a": "BatchNorm, ReLU after norm", "b": "linear", "norm": "after a"}
    assert trace.unusable == {}
    assert trace.direct_products == []
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())


def test_a_layer_with_another_output_than_its_product_is_unusable():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(Doubled(5, 5), nn.ReLU(), nn.Linear(5, 2))
    with evaluation_mode(net):
        trace = trace_forward(net, find_layers(net)[0], [CalibrationBatch(torch.randn(9, 5))])
    assert trace.unusable == {"0": "Doubled does not compute the product of its weights and inputs"}
    assert list(trace.contexts) == ["2"]


def test_a_weight_that_is_used_outside_its_layer_is_unusable():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.own = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return self.b(self.a(x)) @ self.a.weight @ self.own

    net = Direct()
    with evaluation_mode(net):
        trace = trace_forward(net, find_layers(net)[0], [CalibrationBatch(torch.randn(9, 4))])
    assert "outside its own forward" in trace.unusable["a"]
    assert list(trace.contexts) == ["b"]
    assert trace.direct_products == ["a.weight", "own"]
