"""Time of a forward pass before and after half of the multiply-accumulates are removed, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.planting import plant_unread_units
from lightning_nettrim import compact
from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.compaction import CompactResult
from lightning_nettrim.layers import find_layers
from lightning_nettrim.pruning.units.costs import UnitCosts
from lightning_nettrim.pruning.units.groups import UnitGroup, find_groups
from recipes.models import ResNet

THREADS = 2
"""Threads of PyTorch."""

ROUND_TO = 8
"""Numbers of units are multiples of this."""

MACS = 0.5
"""Fraction of the multiply-accumulates that is left."""

SECONDS = 20.0
"""Time of the measurement of both networks at one batch size, of which the median run counts."""

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "resnet50": (lambda: torchvision.models.resnet50(weights=None), (3, 224, 224), (1, 32)),
    "ResNet of the recipe": (ResNet, (28, 28), (1, 256)),
}
"""Networks with random weights, the shapes of their inputs, and the batch sizes."""


@dataclass(frozen=True)
class Row:
    """One network at one batch size.

    Attributes:
        network: its name.
        macs: fraction of the multiply-accumulates that is left.
        parameters: fraction of the parameters that is left.
        batch: batch size.
        before: median time of a forward pass of the network with all units, in milliseconds.
        after: the same of the compact network.
        ratio: of both times.
    """

    network: str
    macs: float
    parameters: float
    batch: int
    before: float
    after: float
    ratio: float

    def __str__(self) -> str:
        """One line of the log."""
        return (
            f"{self.network:20} {self.macs:6.1%} {self.parameters:6.1%} {self.batch:5} {self.before:9.2f}"
            f" {self.after:9.2f} {self.ratio:5.2f}"
        )


def rows(seconds: float = SECONDS) -> Iterator[Row]:
    """Every network and batch size.

    Args:
        seconds: time of the measurement of both networks at one batch size.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        for name, (make, shape, batch_sizes) in NETWORKS.items():
            torch.manual_seed(0)
            model, images = make().eval(), torch.randn(max(batch_sizes), *shape)
            result = without_units(model, images[:2], MACS)
            before, after = result.report.before, result.report.after
            left = after.macs / before.macs, after.parameters / before.parameters
            for size in batch_sizes:
                times = median_times((model, result.model), images[:size], seconds)
                yield Row(name, *left, size, *times, times[0] / times[1])
    finally:
        torch.set_num_threads(threads)


def without_units(model: nn.Module, images: Tensor, fraction: float) -> CompactResult:
    """The compact network with about the same fraction of the units of each group, chosen at random."""
    batch = CalibrationBatch(images)
    layers, _ = find_layers(model)
    groups, _ = find_groups(model, batch, layers)
    kept = numbers_of_units(UnitCosts(model, batch, groups), groups, fraction)
    removed = {name: torch.randperm(group.size)[kept[name] :] for name, group in groups.items()}
    plant_unread_units(layers, groups, removed)
    return compact(model, images, batch_sizes=())


def numbers_of_units(costs: UnitCosts, groups: Mapping[str, UnitGroup], fraction: float) -> dict[str, int]:
    """The most units of each group, in about the same proportion, within a fraction of the multiply-accumulates."""

    def kept(proportion: float) -> dict[str, int]:
        rounded = {name: ROUND_TO * round(proportion * group.size / ROUND_TO) for name, group in groups.items()}
        return {name: min(max(number, ROUND_TO), groups[name].size) for name, number in rounded.items()}

    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if costs.of(kept(middle), "macs") <= fraction * costs.total("macs"):
            low = middle
        else:
            high = middle
    return kept(low)


@torch.no_grad()
def median_times(models: Sequence[nn.Module], images: Tensor, seconds: float) -> list[float]:
    """The median time of a forward pass of each model in milliseconds; the models are run in turn."""
    times: list[list[float]] = [[] for _ in models]
    for model in models:
        model(images)  # not timed: memory is allocated
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[0]) < 3:
        for model, own in zip(models, times, strict=True):
            begin = time.perf_counter()
            model(images)
            own.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(own) for own in times]


def table(rows: Sequence[Row]) -> str:
    """One line for each row."""
    head = f"{'network':20} {'MACs':>6} {'param.':>6} {'batch':>5} {'before/ms':>9} {'after/ms':>9} {'ratio':>5}"
    return "\n".join([head, *map(str, rows)])
