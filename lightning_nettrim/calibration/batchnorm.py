"""Re-estimation of the running statistics of BatchNorms on the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.batch import CalibrationBatch, StopForward
from lightning_nettrim.layers import joined
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_nettrim.runtime.sharded import full

Moments = tuple[int, Tensor, Tensor]
"""Size, mean and variance of a sample; mean and variance are ``(channels,)``."""


def reestimate(
    model: nn.Module, name: str, batches: Iterable[CalibrationBatch], processes: ProcessGroup = SINGLE_PROCESS
) -> dict[str, Tensor]:
    """Re-estimate the running statistics of one BatchNorm.

    Args:
        model: the model, in evaluation mode.
        name: name of the BatchNorm.
        batches: the batches of the calibration set.
        processes: processes that each have batches of their own.

    Returns:
        ``{name: values}``: mean and variance of its inputs, ``(channels,)`` each, in float64.
    """
    ((_, (mean, variance)),) = _statistics(model, [name], batches, processes).items()
    return {joined(name, "running_mean"): mean, joined(name, "running_var"): variance}


def reestimate_preserving_output(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[CalibrationBatch],
    processes: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Re-estimate the running statistics of several BatchNorms, and adapt γ and β so that their outputs do not change.

    γ′ = γσ′/σ and β′ = β + (μ′ − μ)γ/σ. A BatchNorm without γ and β keeps its statistics.

    Args:
        model: the model, in evaluation mode.
        names: names of the BatchNorms.
        batches: the batches of the calibration set.
        processes: processes that each have batches of their own.

    Returns:
        ``{name: values}``: running statistics and parameters, ``(channels,)`` each, in float64.
    """
    values: dict[str, Tensor] = {}
    affine = [name for name in names if model.get_submodule(name).weight is not None]
    for name, (mean, variance) in _statistics(model, affine, batches, processes).items():
        norm: Any = model.get_submodule(name)
        sigma, new_sigma = (norm.running_var.double() + norm.eps).sqrt(), (variance + norm.eps).sqrt()
        gamma, beta = full(norm.weight).double(), full(norm.bias).double()
        values |= {
            joined(name, "running_mean"): mean,
            joined(name, "running_var"): variance,
            joined(name, "weight"): gamma * new_sigma / sigma,
            joined(name, "bias"): beta + (mean - norm.running_mean.double()) * gamma / sigma,
        }
    return values


def _statistics(
    model: nn.Module, names: Sequence[str], batches: Iterable[CalibrationBatch], processes: ProcessGroup
) -> dict[str, tuple[Tensor, Tensor]]:
    """``{name: (mean, variance)}``: unbiased statistics of the inputs of modules by channel, over all processes.

    Each forward pass after the first ends when the modules have been called as often as in the first, if it may.
    """
    moments: dict[str, Moments] = {}
    calls = in_first = 0

    def update(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal calls
            x = args[0].detach().transpose(0, 1).flatten(1)
            variance, mean = torch.var_mean(x, 1, correction=0)
            batch_moments = x.shape[1], mean.double(), variance.double()
            moments[name] = _pooled(moments[name], batch_moments) if name in moments else batch_moments
            calls += 1
            if calls == in_first:
                raise StopForward

        return hook

    with processes.raise_together(), ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(update(name)).remove)
        if names:
            for batch in batches:
                calls = 0
                batch.run_until_stopped(model)
                in_first = in_first or (calls if batch.can_stop(model) else 0)
    pooled = {name: reduce(_pooled, _gathered(own, processes)) for name, own in moments.items()}
    return {name: (mean, variance * n / max(n - 1, 1)) for name, (n, mean, variance) in pooled.items()}


def _pooled(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two samples, by Chan's update."""
    (n_a, mean_a, variance_a), (n_b, mean_b, variance_b) = a, b
    delta, weight = mean_b - mean_a, n_b / (n_b + n_a)
    variance = (1 - weight) * variance_a + weight * variance_b + weight * (1 - weight) * delta.square()
    return n_b + n_a, mean_a + weight * delta, variance


def _gathered(moments: Moments, processes: ProcessGroup) -> list[Moments]:
    """The moments of every process."""
    n, mean, variance = moments
    rows = processes.gather_rows(torch.stack([mean, variance]))
    return [(count, *pair) for count, pair in zip(processes.gather(n), rows.unflatten(0, (-1, 2)), strict=True)]
