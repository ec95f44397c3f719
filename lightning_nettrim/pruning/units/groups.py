"""Groups of units that are coupled, with the layers that compute and read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.layers import Layer, masking
from lightning_nettrim.pruning.units.graph import (
    Coupled,
    coupled_with,
    dependency_graph,
    outputs,
    torch_pruning_package,
)
from lightning_nettrim.pruning.units.surgery import RemovedChannels

ROUNDING = 8
"""Relative change of the output, in units of its precision, up to which unread units do not influence it.

It is nearly always zero: what is not read is multiplied by zero.
"""


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units, of which each is computed and read by the same modules.

    Two units of different layers are one unit if a residual sum or another element-wise operation couples them, and so
    are the channels at the same position in all groups of a grouped convolution, so that its groups stay equal.

    Attributes:
        name: of the first module of the network that computes the units.
        size: number of units.
        readers: ``{layer: (size, c)}`` the input channels of each layer that reads units, in order of execution; a
            layer has the name of its module.
        producers: ``{module: (size, c)}`` the outputs of each module that computes units.
        channelwise: ``{module: (size, c)}`` the channels of modules that process each unit on its own, as a BatchNorm.
    """

    name: str
    size: int
    readers: Mapping[str, Tensor]
    producers: Mapping[str, Tensor]
    channelwise: Mapping[str, Tensor]


def find_groups(
    model: nn.Module, batch: CalibrationBatch, layers: Mapping[str, Layer]
) -> tuple[dict[str, UnitGroup], dict[str, str]]:
    """Find the groups of units that can be removed.

    Args:
        model: the model; it is not changed.
        batch: a small batch.
        layers: the layers that may be changed, in order of execution.

    Returns:
        The groups by name, in the order in which their first readers are executed, and the reasons for the others.

    Raises:
        ModuleNotFoundError: without the package torch-pruning.
        ValueError: if the forward pass cannot be traced.
    """
    graph = dependency_graph(model, batch)
    names = {module: name for name, module in model.named_modules()}
    by_module = {layer.module: layer for layer in layers.values() if layer.weight == "weight"}
    groups, skipped, visited = dict[str, UnitGroup](), dict[str, str](), set[int]()
    for module in [m for m in graph.module2node if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]:
        if id(module) in visited:
            continue
        items = coupled_with(graph, module)
        try:
            if items is None:
                raise _Unsuitable("Torch-Pruning does not find what is coupled with its units")
            visited.update(id(item.module) for item in items if item.computes)
            group = _group(items, by_module, names)
            _check_separable(model, batch, group, layers)
            groups[group.name] = group
        except _Unsuitable as reason:
            skipped[names[module]] = str(reason)
    order = {name: i for i, name in enumerate(layers)}
    ordered = sorted(groups.values(), key=lambda group: order[next(iter(group.readers))])
    return {group.name: group for group in ordered}, skipped


class _Unsuitable(Exception):
    """The reason why a group cannot be removed."""


def _group(items: Sequence[Coupled], by_module: Mapping[nn.Module, Layer], names: Mapping[nn.Module, str]) -> UnitGroup:
    """The group of what is coupled with a layer, which is the first item."""
    operations = torch_pruning_package().ops.OPTYPE
    unit_of = _units(items)
    size = int(unit_of.max()) + 1
    readers, producers, channelwise = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for item in items:
        module, kind = item.module, item.kind
        if kind == operations.OUTPUT:
            raise _Unsuitable("its units are an output of the network")
        if isinstance(module, nn.Parameter):
            raise _Unsuitable("a parameter that belongs to no layer is combined with its units")
        if module not in names:
            continue  # an operation without parameters
        path = names[module]
        channels = _by_unit(item.channels, unit_of[item.units].tolist(), size, path)
        if kind in (operations.LINEAR, operations.CONV):
            if module not in by_module:
                raise _Unsuitable(f"{path} is not pruned")
            if getattr(module, "groups", 1) > 1:
                _check_grouped(module, channels, item.computes, path)
            layer = by_module[module]
            if layer.aliases:
                raise _Unsuitable(f"{path} is shared with {', '.join(alias.name for alias in layer.aliases)}")
            if item.computes:
                producers[path] = channels
            else:
                readers[layer.name] = channels
        elif kind in (operations.BN, operations.DEPTHWISE_CONV, operations.PRELU, operations.IN):
            channelwise[path] = channels
        else:
            raise _Unsuitable(f"{path} is a {type(module).__name__}, which does not process each unit on its own")
    if not readers:
        raise _Unsuitable("no layer reads its units")
    if not producers:
        raise _Unsuitable("no layer that can be pruned computes its units")
    if size < 2:
        raise _Unsuitable("it has one unit")
    order = {layer.name: i for i, layer in enumerate(by_module.values())}
    readers = dict(sorted(readers.items(), key=lambda item: order[item[0]]))
    name = next(name for name in names.values() if name in producers)
    return UnitGroup(name, size, readers, producers, channelwise)


def _units(items: Sequence[Coupled]) -> Tensor:
    """``(outputs of the first layer,)``: their units.

    Channels at the same position in the groups of a grouped convolution are one unit.
    """
    size, grouped = len(items[0].channels), list[tuple[Tensor, Tensor]]()
    for item in items:
        if item.kind == torch_pruning_package().ops.OPTYPE.CONV and item.module.groups > 1:
            total = item.module.out_channels if item.computes else item.module.in_channels
            positions = torch.tensor(item.channels) % (total // item.module.groups)
            grouped.append((positions, torch.tensor(item.units)))
    units, before = torch.arange(size), torch.arange(0)
    while not torch.equal(units, before):
        before = units
        for positions, roots in grouped:
            lowest = torch.full((size,), size).scatter_reduce(0, positions, units[roots], "amin")
            units = units.scatter_reduce(0, roots, lowest[positions], "amin")
    return units.unique(return_inverse=True)[1]


def _by_unit(indices: Sequence[int], units: Sequence[int], size: int, path: str) -> Tensor:
    """``(size, c)``: the channels of each unit."""
    own: list[list[int]] = [[] for _ in range(size)]
    for index, unit in zip(indices, units, strict=True):
        own[unit].append(index)
    if len({len(channels) for channels in own}) != 1:
        raise _Unsuitable(f"{path} has different numbers of channels for its units")
    return torch.tensor([sorted(channels) for channels in own])


def _check_grouped(module: Any, channels: Tensor, computes: bool, path: str) -> None:
    """Check that the groups of a grouped convolution stay equal.

    Raises:
        _Unsuitable: if they do not, or if the convolution is transposed.
    """
    if module.transposed:
        raise _Unsuitable(f"{path} is a transposed convolution with groups")
    width = (module.out_channels if computes else module.in_channels) // module.groups
    positions = channels.unflatten(1, (module.groups, -1)) if channels.shape[1] % module.groups == 0 else None
    starts = width * torch.arange(module.groups).unsqueeze(-1)
    if positions is None or not torch.equal(positions - starts, positions[:, :1].expand_as(positions)):
        raise _Unsuitable(f"{path} is a grouped convolution, of whose groups only some have its units")


def rows_of_channels(layer: Layer, channels: Tensor) -> Tensor:
    """``(..., b)``: the inputs of a layer that belong to ``(..., c)`` channels; a kernel has several for each.

    A grouped convolution has the same inputs in each group.
    """
    module: Any = layer.module
    width = (module.in_features if isinstance(module, nn.Linear) else module.in_channels) // layer.groups
    each = layer.inputs // width
    first = channels[..., : channels.shape[-1] // layer.groups]  # those of the first group
    return (first.unsqueeze(-1) * each + torch.arange(each)).flatten(-2)


def channels_of_units(groups: Mapping[str, UnitGroup], kept: Mapping[str, Tensor]) -> dict[str, RemovedChannels]:
    """The channels that each module loses without some units.

    Args:
        groups: the groups of units.
        kept: ``{group: (size,) bool}``.
    """
    inputs: dict[str, set[int]] = {}
    outputs: dict[str, set[int]] = {}
    for name, group in groups.items():
        for paths, sides in ((group.readers, inputs), (group.producers, outputs), (group.channelwise, outputs)):
            for path, channels in paths.items():
                sides.setdefault(path, set()).update(channels[~kept[name]].flatten().tolist())
    return {
        path: RemovedChannels(tuple(sorted(inputs.get(path, ()))), tuple(sorted(outputs.get(path, ()))))
        for path in {**outputs, **inputs}
        if inputs.get(path) or outputs.get(path)
    }


def _check_separable(model: nn.Module, batch: CalibrationBatch, group: UnitGroup, layers: Mapping[str, Layer]) -> None:
    """Check that units which no layer reads do not influence the output of the model.

    The readers do not read every second unit; then the weights that compute these are changed by more than their size.
    A softmax over the units or an attention score, for example, mixes them in a way that a dependency graph does not
    show.

    Raises:
        _Unsuitable: if the output changes.
    """
    dead, generator = torch.arange(0, group.size, 2), torch.Generator().manual_seed(0)
    producers = {path: model.get_submodule(path) for path in group.producers}
    trained = masking.clone(
        model,
        [
            *(layers[name].parameter_names(bias=False)[0] for name in group.readers),
            *(f"{path}.{key}" for path, module in producers.items() for key, _ in module.named_parameters()),
        ],
    )
    try:
        with evaluation_mode(model):
            values: dict[str, Tensor] = {}
            for name, channels in group.readers.items():
                W = layers[name].to_matrix(layers[name].parameter.detach()).clone()
                W[:, rows_of_channels(layers[name], channels[dead]).flatten()] = 0
                values[layers[name].parameter_names(bias=False)[0]] = layers[name].from_matrix(W)
            masking.assign(model, values)
            before, values = outputs(model, batch), {}
            for path, module in producers.items():
                for key, parameter in module.named_parameters():
                    changed = parameter.detach().clone()
                    dim = 1 if key == "weight" and getattr(module, "transposed", False) else 0
                    index = group.producers[path][dead].flatten().to(changed.device)
                    own = changed.index_select(dim, index)
                    size = changed.square().mean().sqrt() + 1 / max(changed[0].numel(), 1) ** 0.5
                    noise = torch.randn(own.shape, generator=generator).to(own)
                    values[f"{path}.{key}"] = changed.index_copy_(dim, index, own + 3 * size * noise)
            masking.assign(model, values)
            after = outputs(model, batch)
    finally:
        masking.assign(model, trained)
    for first, second in zip(before, after, strict=True):
        if not first.is_floating_point():
            continue
        tolerance = ROUNDING * torch.finfo(first.dtype).eps
        if not bool((first - second).norm() <= tolerance * first.norm()):
            raise _Unsuitable("its units influence the output in other ways than through the layers that read them")
