"""Masks: what the pruned weights keep, how they are swapped in, and how their zeros stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the model's parameters and buffers in place, all of them or none.

    Raises:
        ValueError: naming the parameter that is missing or of another shape; nothing has been written then.
    """
    for name, parameter in checked(model, values).items():
        parameter.copy_(values[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def checked(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters and buffers that ``values`` names, once every shape is seen to agree."""
    parameters = _tensors(model)
    for name, value in values.items():
        got = tuple(parameters[name].shape) if name in parameters else None
        if got != tuple(value.shape):
            raise ValueError(f"{name}: expected a parameter of shape {tuple(value.shape)}, got {got or 'none'}")
    return {name: parameters[name] for name in values}


def clone(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Copies of the named parameters and buffers."""
    parameters = _tensors(model)
    return {name: parameters[name].detach().clone() for name in names}


@contextmanager
def restored_on_error(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A `with` that puts these values into the parameters if its body does not end normally, by whatever exception."""
    try:
        yield
    except BaseException:
        assign(model, values)
        raise


@torch.no_grad()
def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set every weight that a mask does not keep to exactly zero, in place."""
    for name, parameter in checked(model, masks).items():
        parameter.masked_fill_(~masks[name].to(parameter.device), 0)


def satisfied(model: nn.Module, masks: Mapping[str, Tensor]) -> bool:
    """Whether the model has the masks' parameters and each is exactly zero where its mask says so."""
    parameters = dict(model.named_parameters())
    return all(
        name in parameters
        and parameters[name].shape == mask.shape
        and not bool(parameters[name].detach()[~mask.to(parameters[name].device)].any())
        for name, mask in masks.items()
    )


def sparsity(tensors: Mapping[str, Tensor]) -> float:
    """Fraction of entries that are exactly zero, in [0, 1]; 0 for none."""
    size = sum(tensor.numel() for tensor in tensors.values())
    zeros = sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in tensors.values())
    return zeros / size if size else 0.0
