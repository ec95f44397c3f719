"""Norms: the running statistics of BatchNorms, re-estimated on the held inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.layers import joined
from lightning_nettrim.ranks import ALONE, Ranks
from lightning_nettrim.replay import Replay

Moments = tuple[int, Tensor, Tensor]  # number, mean and variance of a sample, channel by channel


def reestimated(model: nn.Module, name: str, replays: Iterable[Replay], ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """The mean and the variance of what one BatchNorm sees, under the names of its running statistics."""
    ((_, (mean, variance)),) = _statistics(model, [name], replays, ranks).items()
    return {joined(name, "running_mean"): mean, joined(name, "running_var"): variance}


def moved(model: nn.Module, names: Sequence[str], replays: Iterable[Replay], ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """The same of several, each with the scale and shift by which it goes on answering as it did.

    γ′ = γσ′/σ and β′ = β + (μ′ − μ)γ/σ. One without scale and shift keeps its statistics.
    """
    values: dict[str, Tensor] = {}
    affine = [name for name in names if model.get_submodule(name).weight is not None]
    for name, (mean, variance) in _statistics(model, affine, replays, ranks).items():
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


def _statistics(
    model: nn.Module, names: Sequence[str], replays: Iterable[Replay], ranks: Ranks
) -> dict[str, tuple[Tensor, Tensor]]:
    """``{name: (mean, variance)}`` of what the modules see, in each channel, over all processes, in float64."""
    found: dict[str, Moments] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().transpose(0, 1).flatten(1)
            variance, mean = torch.var_mean(x, 1, correction=0)
            now = x.shape[1], mean.double(), variance.double()
            found[name] = _pooled(found[name], now) if name in found else now

        return hook

    with ranks.together(), ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(listen(name)).remove)
        if names:
            for replay in replays:
                replay(model)
    everywhere = {name: reduce(_pooled, _of_all(moments, ranks)) for name, moments in found.items()}
    return {name: (mean, variance * n / max(n - 1, 1)) for name, (n, mean, variance) in everywhere.items()}


def _pooled(some: Moments, more: Moments) -> Moments:
    """Number, mean and variance of two samples together, by Chan's update."""
    (m, other, spread), (n, mean, variance) = some, more
    shift, part = mean - other, n / (n + m)
    variance = (1 - part) * spread + part * variance + part * (1 - part) * shift.square()
    return n + m, other + part * shift, variance


def _of_all(moments: Moments, ranks: Ranks) -> list[Moments]:
    """Those of every process."""
    n, mean, variance = moments
    table = ranks.rows(torch.stack([mean, variance]))
    return [(count, *pair) for count, pair in zip(ranks.gather(n), table.unflatten(0, (-1, 2)), strict=True)]
