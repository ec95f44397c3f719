"""Descriptions and equality of what follows a layer."""

from __future__ import annotations

import torch

from lightning_nettrim.core.activation import Rectifier
from lightning_nettrim.layers.context import LayerContext


def test_the_description_names_the_operations_in_order():
    assert str(LayerContext(1)) == "linear"
    assert str(LayerContext(3, "norm", 2, Rectifier(0.0, 6.0))) == "BatchNorm, sum, sum, clamp to [0, 6]"


def test_contexts_are_equal_if_the_same_operations_follow():
    contexts = [
        LayerContext(1),
        LayerContext(1, "norm"),
        LayerContext(1, "other"),
        LayerContext(1, None, 1),
        LayerContext(1, None, 0, Rectifier()),
        LayerContext(1, None, 0, Rectifier(slope=torch.tensor(0.1))),
    ]
    for i, one in enumerate(contexts):
        assert [one.equals(other) for other in contexts] == [i == j for j in range(len(contexts))]
    assert LayerContext(1, "norm", 1, Rectifier()).equals(LayerContext(2, "norm", 1, Rectifier()))
