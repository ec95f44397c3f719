"""The layer type of a module is that of the first registered class in its method resolution order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nettrim.layers import find_layers
from lightning_nettrim.layers.attention import InProjection
from lightning_nettrim.layers.conv import Conv, ConvTranspose
from lightning_nettrim.layers.linear import Linear, TransposedLinear
from lightning_nettrim.layers.registry import layer_type_of, register_layer


class Doubled(nn.Linear):
    pass


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))


@pytest.mark.parametrize(
    ("module", "layer_type"),
    [
        (nn.Linear(2, 2), Linear),
        (Doubled(2, 2), Linear),
        (nn.Conv3d(1, 1, 1), Conv),
        (nn.ConvTranspose1d(1, 1, 1), ConvTranspose),
        (nn.MultiheadAttention(4, 2), InProjection),
        (nn.Bilinear(2, 2, 2), None),
        (nn.ReLU(), None),
    ],
)
def test_known_modules(module, layer_type):
    assert layer_type_of(module) is layer_type


def test_conv1d_of_transformers_is_known_by_its_name():
    kind = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    assert layer_type_of(kind()) is TransposedLinear


def test_a_registered_class_and_its_subclasses_can_be_pruned():
    class Other(Bias):
        pass

    model = nn.Sequential(nn.Linear(2, 3), Other())
    assert "no layer type is registered" in find_layers(model)[1]["1"]
    register_layer(Bias, TransposedLinear)
    layers, _ = find_layers(model)
    assert type(layers["1"]) is TransposedLinear


def test_a_later_registration_replaces_an_earlier_one():
    class Special(nn.Linear):
        pass

    register_layer(Special, TransposedLinear)
    assert layer_type_of(Special(2, 2)) is TransposedLinear
    register_layer(Special, Linear)
    assert layer_type_of(Special(2, 2)) is Linear


@pytest.mark.parametrize(
    ("module_type", "layer_type", "message"),
    [
        (Linear, Linear, "module_type: expected a subclass of torch.nn.Module"),
        (nn.Linear(2, 2), Linear, "module_type: expected a subclass of torch.nn.Module"),
        (nn.Linear, nn.Linear, "layer_type: expected a subclass of Layer"),
    ],
)
def test_other_classes_are_refused(module_type, layer_type, message):
    with pytest.raises(TypeError, match=message):
        register_layer(module_type, layer_type)
