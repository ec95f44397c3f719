"""The BatchNorm that follows a layer is folded into its matrices, solved with it, and unfolded into the parameters."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from networks import ConvBlock
from torch import nn
from torch.nn import functional as F

from lightning_nettrim import Cardinality, trim
from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.tracing import trace_forward
from lightning_nettrim.core.activation import Rectifier
from lightning_nettrim.layers import find_layers
from lightning_nettrim.layers.context import LayerContext
from lightning_nettrim.layers.folding import FoldedLayer

OPTIONS = {"targets": ["conv"], "allocate": "uniform", "num_samples": 4000}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("penalize_bias", [False, True])
def test_unfolding_is_the_inverse_of_folding(bias, affine, penalize_bias):
    model = ConvBlock(False, bias=bias, affine=affine).double().eval()
    context = LayerContext(1, "norm", 0, Rectifier())
    folded = FoldedLayer.create(find_layers(model)[0]["conv"], context, model, penalize_bias)
    values = folded.to_parameters(folded.matrix())
    assert list(values) == folded.written_names
    for name, value in values.items():
        torch.testing.assert_close(value, model.get_parameter(name).detach())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("penalize_bias", [False, True])
def test_products_with_the_folded_matrices_are_the_normalized_outputs(bias, affine, penalize_bias):
    model, x = ConvBlock(False, bias=bias, affine=affine).double().eval(), torch.randn(5, 4, 6, 6).double()
    layer = find_layers(model)[0]["conv"]
    folded = FoldedLayer.create(layer, LayerContext(1, "norm", 0, None), model, penalize_bias)
    assert folded.has_ones == (bias or (affine and not penalize_bias))
    assert folded.shift_in_bias == ((bias or affine) and not penalize_bias)
    with torch.no_grad():
        output, expected = model.conv(x), model.norm(model.conv(x)).movedim(1, -1).flatten(0, -2)
        call = layer.observe((x,), {}, output)
        positions = torch.arange(call.count)
        U = folded.input_rows(call.inputs(positions)) @ folded.matrix()
        offset = folded.offset(None)
    torch.testing.assert_close((U if offset is None else U + offset)[0], expected)
    torch.testing.assert_close(folded.response(call.outputs(positions), None)[0], expected)


class WithoutFolding(Cardinality):
    """Is given the layer on its own, as if nothing followed it."""

    uses_folded_layer: ClassVar[bool] = False


@pytest.mark.parametrize(
    "activation",
    [F.relu, F.relu6, lambda u: F.hardtanh(u, -1, 0.5), lambda u: F.leaky_relu(u, 0.1)],
    ids=["relu", "relu6", "hardtanh", "leaky_relu"],
)
@pytest.mark.parametrize("residual", [False, True])
def test_folding_decreases_the_error_after_the_activation(residual, activation):
    model, x = ConvBlock(residual, activation).eval(), torch.randn(30, 4, 8, 8)
    errors = {}
    for name, solver in {"folded": Cardinality(), "not folded": WithoutFolding()}.items():
        network = copy.deepcopy(model)
        refit = name == "folded"
        result = trim(network, [x], sparsity=0.7, solver=solver, refit=refit, **OPTIONS)
        with torch.no_grad():
            response, expected = network.response(x), model.response(x)
        errors[name] = float((response - expected).norm() / expected.norm())
        assert list(network.state_dict()) == list(model.state_dict())
        assert int((network.conv.weight == 0).sum()) == round(0.7 * 216)
        if name == "folded":
            assert result.reports[0].local_error == pytest.approx(errors[name], rel=0.1)
            assert result.reports[0].end_to_end_error == pytest.approx(result.reports[0].local_error, rel=1e-3)
    assert errors["folded"] < 0.97 * errors["not folded"]


@pytest.mark.parametrize(
    ("bias", "affine", "penalize"), [(True, False, False), (False, False, False), (True, True, True)]
)
def test_the_shift_is_absorbed_by_a_parameter_if_there_is_one(bias, affine, penalize):
    model, x = ConvBlock(False, bias=bias, affine=affine).eval(), torch.randn(30, 4, 8, 8)
    before = copy.deepcopy(model)
    result = trim(model, [x], sparsity=0.5, penalize_bias=penalize, recalibrate_batchnorm=False, **OPTIONS)
    with torch.no_grad():
        response, expected = model.response(x), before.response(x)
    error = float((response - expected).norm() / expected.norm())
    assert result.reports[0].local_error == pytest.approx(error, rel=1e-3)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed == {"conv.weight"} | ({"conv.bias"} if bias else set())
    assert result.reports[0].zeros == round(0.5 * (216 + 6 * penalize))


def test_channels_with_a_scale_of_zero_are_pruned_to_the_exact_count():
    model, x = ConvBlock(False).eval(), torch.randn(30, 4, 8, 8)
    with torch.no_grad():
        model.norm.weight[2:4] = 0
    before = copy.deepcopy(model)
    trim(model, [x], sparsity=0.5, recalibrate_batchnorm=False, **OPTIONS)
    assert int((model.conv.weight == 0).sum()) == 108
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert torch.equal(model.norm.bias[2:4], before.norm.bias[2:4])
    with torch.no_grad():
        model.norm.weight.zero_()
    trim(model, [x], sparsity=0.7, **OPTIONS)
    assert int((model.conv.weight == 0).sum()) == round(0.7 * 216)


def test_a_batchnorm_that_two_layers_share_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(5, 4), nn.Linear(5, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.a(x)).relu() + self.norm(self.b(x)).relu()

    model, x = Shared().eval(), torch.randn(200, 5)
    before = model.norm.bias.clone()
    with evaluation_mode(model):
        trace = trace_forward(model, find_layers(model)[0], [CalibrationBatch(x)])
    assert {name: str(context) for name, context in trace.contexts.items()} == {"a": "linear", "b": "linear"}
    trim(model, [x], sparsity=0.5)
    assert torch.equal(model.norm.bias, before)


def test_the_response_does_not_modify_the_recording():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    model[1].running_var.mul_(1e-4)
    folded = FoldedLayer.create(find_layers(model)[0]["0"], LayerContext(1, "1", 1, Rectifier()), model, False)
    Z, R = torch.randn(100, 6), torch.randn(100, 6)
    before = Z.clone(), R.clone()
    first = folded.response(Z, R)
    assert torch.equal(folded.response(Z, R), first)
    assert torch.equal(Z, before[0])
    assert torch.equal(R, before[1])
