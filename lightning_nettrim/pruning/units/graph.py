"""The dependencies of a network's channels, found by Torch-Pruning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.nested import map_tensors, tensors_of
from lightning_nettrim.calibration.network_output import find_output

TRACED_INPUTS = 2
"""Inputs of the batch on which a network is traced."""

MOST_INDICES = 2**21
"""Indices of channels up to which the dependencies of one layer are followed.

Torch-Pruning's maps of indices can grow without end where channels are rearranged, as in a shifted-window attention.
"""


def torch_pruning_package() -> Any:
    """The package of the optional extra.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package torch-pruning for whole units, got none: pip install lightning_nettrim[compact]"
        ) from error
    return torch_pruning


def dependency_graph(model: nn.Module, batch: CalibrationBatch) -> Any:
    """The `torch_pruning.DependencyGraph` of a model, traced on a batch; the model is not changed.

    Args:
        model: the model.
        batch: a small batch.

    Raises:
        ModuleNotFoundError: without the package torch-pruning.
        ValueError: if the forward pass cannot be traced.
    """
    graph = torch_pruning_package().DependencyGraph()
    with evaluation_mode(model), torch.enable_grad(), _requiring_gradients(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = replace(batch, batch=map_tensors(batch.batch, torch.clone))  # of an inference tensor a normal one
        try:
            return graph.build_dependency(model, batch, forward_fn=outputs, verbose=False)
        except Exception as error:  # a model may raise anything while it is traced
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"pattern 'units': expected a forward pass that Torch-Pruning can trace, got {reason!r}: choose another"
                " pattern"
            ) from error


class Coupled(NamedTuple):
    """Channels of a module or an operation that are coupled with the units of a layer."""

    module: Any  # a module of the network, a parameter, or an operation without parameters
    kind: Any  # of the module, a `torch_pruning.ops.OPTYPE`
    computes: bool  # whether they are outputs
    channels: list[int]
    units: list[int]  # the unit of each channel


def coupled_with(graph: Any, module: nn.Module) -> list[Coupled] | None:
    """What is coupled with the outputs of a layer; ``None`` if there is no end of it, or channels that do not exist.

    The same as Torch-Pruning's ``get_pruning_group``, which does not return if there is no end of it.

    Args:
        graph: the dependency graph.
        module: the layer.
    """
    index = torch_pruning_package()._helpers._HybridIndex
    pruner, root = graph.get_pruner_of_module(module), graph.module2node[module]
    first = [index(idx=i, root_idx=i) for i in range(pruner.get_out_channels(module))]
    stack = [(root, pruner.prune_out_channels, first)]
    found, visited, total = dict[Any, dict[int, int]](), set[Any](), 0
    while stack:
        node, handler, indices = stack.pop()
        if (visit := (node, handler, tuple(indices))) in visited:
            continue
        visited.add(visit)
        computes, total = graph.is_out_channel_pruning_fn(handler), total + len(indices)
        if total > MOST_INDICES or max(indices).idx >= _channels(graph, node, computes):
            return None
        merged = found.setdefault((node, handler), {})
        for i in indices:
            merged.setdefault(i.idx, i.root_idx)
        for dependency in node.dependencies:
            if dependency.is_triggered_by(handler):
                mapped = indices
                for mapping in filter(None, dependency.index_mapping):
                    mapped = mapping(mapped)
                if mapped:
                    stack.append((dependency.target, dependency.handler, mapped))
    return [
        Coupled(node.module, node.type, graph.is_out_channel_pruning_fn(handler), [*channels], [*channels.values()])
        for (node, handler), channels in found.items()
    ]


def _channels(graph: Any, node: Any, computes: bool) -> float:
    """The number of channels of a module; infinity for an operation without parameters."""
    counted = nn.Linear | nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm | nn.LayerNorm
    if not isinstance(node.module, counted):
        return math.inf
    return graph.get_out_channels(node) if computes else graph.get_in_channels(node)


def outputs(model: nn.Module, batch: CalibrationBatch) -> list[Tensor]:
    """All outputs of a model that depend on its parameters; its last layer's output if it returns none of them."""
    returned = tensors_of(batch(model))
    found = [tensor for tensor in returned if tensor.grad_fn is not None] if torch.is_grad_enabled() else returned
    return found or [find_output(model, batch).of(model, batch)]


@contextmanager
def _requiring_gradients(model: nn.Module) -> Iterator[None]:
    """A `with` in which all parameters require gradients."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
