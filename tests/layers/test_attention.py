"""The two projections of an attention as layers."""

from __future__ import annotations

import pytest
import torch
from networks import AttentionNetwork
from torch import nn

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.recording import record
from lightning_nettrim.layers import find_layers


def test_the_inputs_of_the_output_projection_are_the_concatenated_heads():
    model, x = AttentionNetwork().double().eval(), torch.randn(5, 7, 16, dtype=torch.float64)
    layer = find_layers(model)[0]["attention.out_proj"]
    weight = model.attention.out_proj.weight
    with evaluation_mode(model):
        recording = record(model, {"o": layer}, [CalibrationBatch(x)], num_samples=10**5, seed=0)["o"]
    torch.testing.assert_close(layer.to_rows(recording.X, True)[0] @ layer.matrix()[0], recording.Z)
    assert model.attention.out_proj.weight is weight


@pytest.mark.parametrize("bias", [True, False])
def test_the_input_projection_is_three_matrices_side_by_side(bias):
    model, x = AttentionNetwork(bias=bias).double().eval(), torch.randn(5, 7, 16, dtype=torch.float64)
    layer = find_layers(model)[0]["attention.in_proj"]
    assert (layer.groups, layer.inputs, layer.outputs) == (1, 16, 48)
    with evaluation_mode(model):
        recording = record(model, {"i": layer}, [CalibrationBatch(x)], num_samples=10**5, seed=0)["i"]
    assert torch.equal(recording.X, x.flatten(0, 1))
    projected = recording.X @ model.attention.in_proj_weight.detach().T
    torch.testing.assert_close(recording.Z, projected + model.attention.in_proj_bias.detach() if bias else projected)
    torch.testing.assert_close(layer.to_rows(recording.X, bias)[0] @ layer.matrix()[0], recording.Z)
    for name, value in layer.to_parameters(layer.matrix()).items():
        assert torch.equal(value, model.get_parameter(name))


def test_cross_attention_is_refused_when_it_is_called():
    model = AttentionNetwork(cross=True).eval()
    layers, skipped = find_layers(model)
    assert list(layers) == ["attention.in_proj", "attention.out_proj", "head"]
    assert not skipped
    with evaluation_mode(model), pytest.raises(ValueError, match="expected self-attention"):
        record(model, layers, [CalibrationBatch(torch.randn(2, 7, 16))], num_samples=9, seed=0)


def test_separate_query_key_and_value_weights_cannot_be_pruned():
    separate = nn.ModuleList([nn.MultiheadAttention(16, 4, kdim=8), nn.Linear(2, 2)])
    layers, skipped = find_layers(separate)
    assert "separate weights" in skipped["0.in_proj"]
    assert list(layers) == ["0.out_proj", "1"]
