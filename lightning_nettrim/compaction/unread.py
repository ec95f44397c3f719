"""The units of a network that no layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.layers import Layer, find_layers
from lightning_nettrim.pruning.units.graph import outputs
from lightning_nettrim.pruning.units.groups import UnitGroup, channels_of_units, find_groups, rows_of_channels
from lightning_nettrim.pruning.units.surgery import RemovedChannels, without_channels
from lightning_nettrim.runtime.sharded import full

RTOL = 1e-4
"""Change of the output, relative to its norm, up to which the network without the units computes the same."""


@dataclass(frozen=True)
class UnreadUnits:
    """What can be removed from a network without changing its output.

    Attributes:
        removed: ``{module: channels}``.
        units: ``{group: (number of units that are kept, number of units)}``.
        skipped: ``{group: reason}`` of the groups of which nothing can be removed.
    """

    removed: Mapping[str, RemovedChannels]
    units: Mapping[str, tuple[int, int]]
    skipped: Mapping[str, str]


def find_unread(model: nn.Module, batch: CalibrationBatch) -> UnreadUnits:
    """Find the units of which no layer reads anything, because all its weights for them are zero.

    The network without them is run once; a group with which it fails, or computes something else, is skipped.

    Args:
        model: the model; it is not changed.
        batch: a small batch.

    Raises:
        ModuleNotFoundError: without the package torch-pruning.
        ValueError: if the forward pass cannot be traced.
    """
    layers, _ = find_layers(model)
    groups, skipped = find_groups(model, batch, layers)
    kept = {name: _is_read(group, layers) for name, group in groups.items()}
    with evaluation_mode(model):
        before = outputs(model, batch)
    removed = channels_of_units(groups, kept)
    if reason := _failure(model, batch, removed, before):
        usable: dict[str, UnitGroup] = {}
        for name, group in groups.items():
            if reason := _failure(model, batch, channels_of_units({**usable, name: group}, kept), before):
                skipped[name] = reason
            else:
                usable[name] = group
        groups = usable
    units = {name: (int(kept[name].sum()), group.size) for name, group in groups.items()}
    return UnreadUnits(channels_of_units(groups, kept), units, skipped)


def _is_read(group: UnitGroup, layers: Mapping[str, Layer]) -> Tensor:
    """``(size,)`` bool: which units a layer reads; at least one, so that no layer is left without inputs."""
    kept = torch.zeros(group.size, dtype=torch.bool)
    for name, channels in group.readers.items():
        read = (layers[name].to_matrix(full(layers[name].parameter.detach())) != 0).any(-1).any(0).cpu()
        kept |= read[rows_of_channels(layers[name], channels)].any(-1)
    if not bool(kept.any()):
        kept[0] = True
    return kept


def _failure(
    model: nn.Module, batch: CalibrationBatch, removed: Mapping[str, RemovedChannels], before: list[Tensor]
) -> str:
    """Why the network does not work without channels; empty if its outputs are the same."""
    try:
        with without_channels(model, removed), evaluation_mode(model):
            after = outputs(model, batch)
    except Exception as error:  # a model may raise anything if a tensor has another size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"the network cannot run without its units: {reason}"
    for first, second in zip(before, after, strict=True):
        if first.shape != second.shape:
            return "its units are an output of the network"
        if first.is_floating_point() and not bool((first - second).norm() <= RTOL * first.norm()):
            return "the output changes without its units"
    return ""
