"""In-place changes of parameters, and masks that keep pruned weights at zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_nettrim.runtime.sharded import full, local, local_part, reshard, sharded_like


@torch.no_grad()
def assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters and buffers of a model, in place, either all or none.

    Args:
        model: the model.
        values: ``{name: values}``.

    Raises:
        ValueError: naming a parameter that is missing or has another shape, before anything is written.
    """
    for name, parameter in checked(model, values).items():
        local(parameter).copy_(local_part(values[name], parameter))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name; those that are divided among processes, as they are."""
    reshard(model)
    return dict(model.named_parameters()) | dict(model.named_buffers())


def divided(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of parameters and buffers, each divided among processes if it is in the model."""
    own = tensors(model)
    return {name: sharded_like(value, own[name]) for name, value in values.items()}


def checked(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters and buffers of a model that ``values`` names, after a check of their shapes.

    Args:
        model: the model.
        values: ``{name: values}``.

    Raises:
        ValueError: naming a parameter that is missing or has another shape.
    """
    parameters = tensors(model)
    for name, value in values.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != tuple(value.shape):
            raise ValueError(
                f"{name}: expected a parameter of shape {tuple(value.shape)}, got {'none' if shape is None else shape}"
            )
    return {name: parameters[name] for name in values}


def clone(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """``{name: tensor}``: detached copies of the named parameters and buffers, divided among processes as they are."""
    parameters = tensors(model)
    return {name: parameters[name].detach().clone() for name in names}


@contextmanager
def restored_on_error(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A `with` that copies ``values`` into the model if its body raises any exception, including ``BaseException``."""
    try:
        yield
    except BaseException:
        assign(model, values)
        raise


@torch.no_grad()
def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set weights to zero where their masks are False, in place.

    Args:
        model: the model.
        masks: ``{name: mask}``, bool tensors, True for weights that are kept.
    """
    for name, parameter in checked(model, masks).items():
        local(parameter).masked_fill_(~local_part(masks[name].to(parameter.device), parameter), 0)


def satisfied(model: nn.Module, masks: Mapping[str, Tensor]) -> bool:
    """Whether the model has a tensor for each mask, of the same shape, that is zero where the mask is False.

    If parameters are divided among processes, all of these must call it.
    """
    parameters = tensors(model)
    return all(
        name in parameters
        and parameters[name].shape == mask.shape
        and not bool(full(parameters[name])[~mask.to(parameters[name].device)].any())
        for name, mask in masks.items()
    )


def sparsity(tensors: Mapping[str, Tensor]) -> float:
    """Fraction of the entries of all tensors that are zero, in [0, 1]; 0 if there are no entries."""
    size = sum(tensor.numel() for tensor in tensors.values())
    zeros = sum(tensor.numel() - int(full(tensor).count_nonzero()) for tensor in tensors.values())
    return zeros / size if size else 0.0
