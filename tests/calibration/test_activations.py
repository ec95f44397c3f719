"""Activations of layers on the calibration set, and which layer reads which."""

from __future__ import annotations

import pytest
import torch
from networks import ConvBlock, activations_of
from torch import nn

from lightning_nettrim.calibration.batch import evaluation_mode


class TwoReaders(nn.Module):
    """Two layers read the output of a residual sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        h = self.a(x).relu()
        k = (self.b(h) + h).relu()
        return self.c(k) * self.d(k)


def test_every_reader_of_a_layer_counts_for_its_importance():
    model, x = TwoReaders().eval(), torch.randn(100, 6)
    activations = activations_of(model, x.split(50))
    weights = {name: folded.W[:, : folded.layer.inputs] for name, folded in activations.folded_layers.items()}
    with evaluation_mode(model):
        found = activations.outgoing_importance(weights)
    assert set(found) == {"a", "b"}
    square = sum(layer.weight.detach().square().sum(0) for layer in (model.c, model.d))
    expected = (square / square.mean()).clamp(min=1e-2).sqrt()
    torch.testing.assert_close(found["b"].flatten(), expected)


def test_the_response_is_that_after_batchnorm_sum_and_activation():
    model, x = ConvBlock(True).eval(), torch.randn(100, 4, 6, 6)
    activations = activations_of(model, x.split(50))
    with evaluation_mode(model):
        found = activations.responses("conv", "head")
        expected = model.response(x)
    torch.testing.assert_close(found["conv"][0], expected.movedim(1, -1).flatten(0, -2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["head"][0], model(x).detach().movedim(1, -1).flatten(0, -2), rtol=1e-4, atol=1e-5)


def test_a_layer_is_the_input_of_another_one_if_its_response_is_bitwise_equal():
    model, x = TwoReaders().eval(), torch.randn(100, 6)
    activations = activations_of(model, x.split(50))
    with evaluation_mode(model):
        recordings = activations.record("a", "b", "c")
        assert activations.is_input_of("a", recordings["a"], recordings["b"])
        assert activations.is_input_of("b", recordings["b"], recordings["c"])
        assert not activations.is_input_of("a", recordings["a"], recordings["c"])
        with torch.no_grad():
            model.c.register_forward_pre_hook(lambda module, args: (args[0] + 1e-6,))
        again = activations.record("b", "c")
        assert not activations.is_input_of("b", recordings["b"], again["c"])


def test_activations_that_are_not_finite_are_refused():
    model, x = TwoReaders().eval(), torch.randn(100, 6)
    activations = activations_of(model, x.split(50))
    with torch.no_grad():
        model.a.weight[0, 0] = torch.inf
    with evaluation_mode(model):
        recording = activations.record("b")["b"]
        with pytest.raises(ValueError, match="b: expected finite activations, got NaN or Inf"):
            activations.inputs("b", recording)


def test_the_first_inputs_are_the_first_batches():
    activations = activations_of(TwoReaders().eval(), torch.randn(200, 6).split(50))
    assert len(activations.calibration_set) == 4
    assert len(activations.first_inputs(110).calibration_set) == 2
