"""Module ⇄ matrix: which layers can be pruned, their weights as matrices, and what they see as rows."""

from lightning_nettrim.layers.attention import InProjection, OutProjection
from lightning_nettrim.layers.base import Layer, Linear, Seen, TransposedLinear, eager_name, joined, solve_dtype
from lightning_nettrim.layers.conv import Conv, ConvTranspose
from lightning_nettrim.layers.select import LEFT_OUT, matrices, per_layer_options, prunable, refuse_unusable

__all__ = [
    "Conv",
    "ConvTranspose",
    "InProjection",
    "LEFT_OUT",
    "Layer",
    "Linear",
    "OutProjection",
    "Seen",
    "TransposedLinear",
    "eager_name",
    "joined",
    "matrices",
    "per_layer_options",
    "prunable",
    "refuse_unusable",
    "solve_dtype",
]
