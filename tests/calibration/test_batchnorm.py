"""Re-estimated running statistics of BatchNorms."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import ConvBlock
from torch import nn

from lightning_nettrim import Magnitude, trim
from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.batchnorm import reestimate, reestimate_preserving_output
from lightning_nettrim.layers import masking


def test_statistics_are_those_of_all_batches_together():
    model, x = ConvBlock(False).double().eval(), torch.randn(30, 4, 8, 8).double()
    with evaluation_mode(model):
        values = reestimate(model, "norm", [CalibrationBatch(part) for part in x.split(7)])
        inputs = model.conv(x)
    assert list(values) == ["norm.running_mean", "norm.running_var"]
    torch.testing.assert_close(values["norm.running_mean"], inputs.mean((0, 2, 3)))
    torch.testing.assert_close(values["norm.running_var"], inputs.transpose(0, 1).flatten(1).var(1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_scale_and_shift_preserve_the_output():
    model, x = ConvBlock(True).double().eval(), torch.randn(30, 4, 8, 8).double()
    with evaluation_mode(model):
        before = model(x)
        values = reestimate_preserving_output(model, ["norm"], [CalibrationBatch(part) for part in x.split(7)])
        masking.assign(model, values)
        torch.testing.assert_close(model(x), before)
        assert torch.equal(model.norm.running_mean, values["norm.running_mean"])


def test_a_batchnorm_without_scale_and_shift_keeps_its_statistics():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)).eval()
    with evaluation_mode(model):
        assert reestimate_preserving_output(model, ["1"], [CalibrationBatch(torch.randn(9, 3))]) == {}


@pytest.mark.parametrize("solver", [None, Magnitude()])
def test_statistics_are_those_of_the_pruned_network_and_its_outputs_stay(solver):
    x = torch.randn(30, 4, 8, 8)
    base = ConvBlock(True).eval()
    networks = [copy.deepcopy(base) for _ in range(2)]
    for network, recalibrate in zip(networks, (True, False), strict=True):
        trim(network, [x], sparsity=0.6, allocate="uniform", solver=solver, recalibrate_batchnorm=recalibrate)
    reestimated, kept = networks
    with torch.no_grad():
        torch.testing.assert_close(reestimated(x), kept(x), rtol=1e-4, atol=1e-4)
        inputs = reestimated.conv(x)
    mean, variance = inputs.mean((0, 2, 3)), inputs.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(reestimated.norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reestimated.norm.running_var, variance, rtol=1e-4, atol=1e-5)
    assert torch.equal(kept.norm.running_var, base.norm.running_var)
    assert not torch.equal(kept.norm.bias, base.norm.bias)


def test_a_batchnorm_that_is_not_solved_with_a_layer_is_reestimated():
    model, x = ConvBlock(False).eval(), torch.randn(30, 4, 8, 8)
    before = copy.deepcopy(model)
    trim(model, [x], sparsity=0.6, targets=["conv"], solver=Magnitude(), refit=False)
    with torch.no_grad():
        inputs = model.conv(x)
    torch.testing.assert_close(model.norm.running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.norm.weight, before.norm.weight)
    assert torch.equal(model.norm.bias, before.norm.bias)
    kept = model.conv.weight != 0
    assert torch.equal(model.conv.weight[kept], before.conv.weight[kept])
