"""Removal of channels from the modules of a network, by Torch-Pruning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_nettrim.pruning.units.graph import torch_pruning_package


@dataclass(frozen=True)
class RemovedChannels:
    """The channels that one module loses.

    Attributes:
        inputs: indices of input channels.
        outputs: indices of output channels.
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def num_channels(module: nn.Module) -> tuple[int, int]:
    """Number of input and of output channels of a module."""
    pruner = _pruner(module)
    return int(pruner.get_in_channels(module) or 1), int(pruner.get_out_channels(module) or 1)


def remove_channels(module: nn.Module, removed: RemovedChannels) -> None:
    """Remove channels from a module in place; it gets new, smaller parameters.

    Args:
        module: a linear layer, a convolution, or a module that processes channels one by one, as a BatchNorm.
        removed: its channels.

    Raises:
        ValueError: for channels that it does not have, or other ones in each group of a grouped convolution.
    """
    for indices, total in zip((removed.inputs, removed.outputs), num_channels(module), strict=True):
        if indices and not 0 <= min(indices) <= max(indices) < total:
            raise ValueError(
                f"expected channels of a {type(module).__name__} with {total}, got {max(indices)}: use the file of this"
                " network"
            )
        if not _keeps_groups_equal(module, indices, total):
            raise ValueError(f"expected the same channels of each group of a {type(module).__name__}: use another file")
    pruner = _pruner(module)
    requires_grad = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    if removed.outputs:
        pruner.prune_out_channels(module, list(removed.outputs))
    if removed.inputs:
        pruner.prune_in_channels(module, list(removed.inputs))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(requires_grad[name])


def _keeps_groups_equal(module: nn.Module, indices: Sequence[int], total: int) -> bool:
    """Whether the same channels of each group of a grouped convolution, which is not depthwise, are removed."""
    groups = int(getattr(module, "groups", 1))
    if groups == 1 or groups == getattr(module, "out_channels", groups):
        return True
    width = total // groups
    positions = {index % width for index in indices}
    return {group * width + position for group in range(groups) for position in positions} == set(indices)


@contextmanager
def without_channels(model: nn.Module, removed: Mapping[str, RemovedChannels]) -> Iterator[None]:
    """A `with` in which some modules have fewer channels; the same parameters are in their places again afterwards.

    Args:
        model: the model.
        removed: ``{module: channels}``.
    """
    modules = {path: model.get_submodule(path) for path in removed}
    before = {path: _attributes(module) for path, module in modules.items()}
    try:
        for path, module in modules.items():
            remove_channels(module, removed[path])
        yield
    finally:
        for path, module in modules.items():
            vars(module).clear()
            vars(module).update(before[path])


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, with copies of the dictionaries of its parameters and buffers."""
    own = vars(module)
    return own | {key: type(own[key])(own[key]) for key in ("_parameters", "_buffers")}


def _pruner(module: nn.Module) -> Any:
    """Torch-Pruning's functions for the class of a module."""
    package = torch_pruning_package()
    return package.pruner.function.PrunerBox[package.ops.module2type(module)]
