"""Zeros where the smallest weights of all layers are."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nettrim.pruning.allocation.balancing import Bounds, balance
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.allocation.uniform import kept_in_total
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.session import CalibrationSession

BUCKETS = 2**15
"""Number of buckets of magnitudes, each of which spans at most a 64th of its values."""


@dataclass(frozen=True)
class MagnitudeAllocation(Allocation):
    """As many weights of each layer as it has among the largest |W| of all layers together."""

    def allocate(self, session: CalibrationSession, sparsity: float) -> dict[str, Budget]:
        """The budget of every layer."""
        sizes, weights = session.shared_sizes(), session.weights()
        total = kept_in_total(sizes, sparsity)
        kept = kept_by_magnitude({name: weights[name] for name in sizes}, total, session.kept_bounds())
        return session.budgets_keeping(kept)


def kept_by_magnitude(weights: Mapping[str, Tensor], total: int, bounds: Bounds) -> dict[str, int]:
    """Weights kept of each layer: those among the largest |W| of all layers together.

    Each layer is read twice, and only one of them need be in memory at a time: the first time its magnitudes are
    counted in buckets, the second time those of the bucket in which the threshold lies are sorted.

    Args:
        weights: ``{name: weights}``.
        total: number of weights to keep of all layers.
        bounds: how many weights of each layer may be kept, at least and at most.
    """
    kept = {name: _kept_from_bucket(weights[name]) for name in weights}  # ascending buckets
    all_kept = torch.stack([*kept.values()]).sum(0)

    def exceeds(bucket: int) -> bool:
        counts = {name: min(max(int(own[bucket]), bounds[name][0]), bounds[name][1]) for name, own in kept.items()}
        return sum(counts.values()) > total

    critical = bisect.bisect_left(range(BUCKETS), True, key=lambda bucket: not exceeds(bucket)) - 1
    critical = max(critical, 0)
    values = {name: _values_in_bucket(weights[name], critical) for name in weights}
    order = torch.cat([*values.values()]).sort(descending=True).values
    above = int(all_kept[critical + 1])

    def choose(t: float) -> dict[str, float]:
        index = min(int(t), int(all_kept[0]) - 1)
        if above <= index < above + len(order):
            threshold = order[index - above]
            return {name: float(own[critical + 1] + (values[name] >= threshold).sum()) for name, own in kept.items()}
        bucket = bisect.bisect_left(range(BUCKETS), True, key=lambda bucket: int(all_kept[bucket]) <= index) - 1
        return {name: float(own[bucket]) for name, own in kept.items()}

    return balance(choose, (0.0, float(all_kept[0])), total, bounds)


def _buckets(magnitudes: Tensor) -> Tensor:
    """The bucket of each magnitude: sign, exponent and the first bits of its float32 representation."""
    return magnitudes.float().view(torch.int32) >> 16


def _kept_from_bucket(weights: Tensor) -> Tensor:
    """``(BUCKETS + 1,)``: number of weights whose magnitude is in a bucket or in a higher one."""
    counts = torch.bincount(_buckets(weights.abs().flatten()), minlength=BUCKETS).cpu()
    return torch.cat([counts.flip(0).cumsum(0).flip(0), counts.new_zeros(1)])


def _values_in_bucket(weights: Tensor, bucket: int) -> Tensor:
    """The magnitudes that are in a bucket."""
    magnitudes = weights.abs().flatten()
    return magnitudes[_buckets(magnitudes) == bucket].cpu()
