"""Norms: the running statistics of BatchNorms, re-estimated on the held inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.layers import joined
from lightning_nettrim.sample import Inputs, forward


def reestimated(model: nn.Module, name: str, batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """The mean and the variance of what one BatchNorm sees, under the names of its running statistics."""
    ((_, (mean, variance)),) = _statistics(model, [name], batches).items()
    return {joined(name, "running_mean"): mean, joined(name, "running_var"): variance}


def moved(model: nn.Module, names: Sequence[str], batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """The same of several, each with the scale and shift by which it goes on answering as it did.

    γ′ = γσ′/σ and β′ = β + (μ′ − μ)γ/σ. One without scale and shift keeps its statistics.
    """
    values: dict[str, Tensor] = {}
    affine = [name for name in names if model.get_submodule(name).weight is not None]
    for name, (mean, variance) in _statistics(model, affine, batches).items():
        norm: Any = model.get_submodule(name)
        old, new = (norm.running_var.double() + norm.eps).sqrt(), (variance + norm.eps).sqrt()
        gamma, beta = norm.weight.double(), norm.bias.double()
        values |= {
            joined(name, "running_mean"): mean,
            joined(name, "running_var"): variance,
            joined(name, "weight"): gamma * new / old,
            joined(name, "bias"): beta + (mean - norm.running_mean.double()) * gamma / old,
        }
    return values


def _statistics(model: nn.Module, names: Sequence[str], batches: Iterable[Inputs]) -> dict[str, tuple[Tensor, Tensor]]:
    """``{name: (mean, variance)}`` of what the modules see, in each channel, in float64, by Chan's updates."""
    found: dict[str, tuple[int, Tensor, Tensor]] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().transpose(0, 1).flatten(1)
            variance, mean = torch.var_mean(x, 1, correction=0)
            n, mean, variance = x.shape[1], mean.double(), variance.double()
            if name in found:
                m, other, spread = found[name]
                shift, n = mean - other, n + m
                part = x.shape[1] / n
                variance = (1 - part) * spread + part * variance + part * (1 - part) * shift.square()
                mean = other + part * shift
            found[name] = n, mean, variance

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(listen(name)).remove)
        if names:
            for batch in batches:
                forward(model, batch)
    return {name: (mean, variance * n / max(n - 1, 1)) for name, (n, mean, variance) in found.items()}
