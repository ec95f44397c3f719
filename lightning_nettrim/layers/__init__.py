"""Layers as matrices: selection of the layers that can be pruned, their weights, and the rows of inputs and outputs."""

from lightning_nettrim.layers.base import Layer, LayerCall, eager_name, joined, solve_dtype
from lightning_nettrim.layers.registry import layer_type_of, register_layer
from lightning_nettrim.layers.selection import EXCLUDED_BY_USER, check_model, find_layers, match_options, matrices

__all__ = [
    "EXCLUDED_BY_USER",
    "Layer",
    "LayerCall",
    "check_model",
    "eager_name",
    "find_layers",
    "joined",
    "layer_type_of",
    "match_options",
    "matrices",
    "register_layer",
    "solve_dtype",
]
