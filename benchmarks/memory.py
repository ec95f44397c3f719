"""Memory: the peak while a large network is pruned, against the limit that was set, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_nettrim import trim


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Args:
        out: folder of the results.
        network: of torchvision, with random weights.
        limits: max_memory, GiB, in turn.
        images: random ones to calibrate on.
        size: pixels of a side.
        batch: images in a batch.
        samples: rows of each layer at most.
        offload: where calibration inputs and trained responses wait.
        scheme: cascade or parallel.
        targets: layers to prune, by name or glob; all if none are given.
    """

    out: Path = Path("runs") / "benchmarks"
    network: str = "resnet50"
    limits: tuple[float, ...] = (1.5, 2.0, 3.0)
    images: int = 128
    size: int = 224
    batch: int = 32
    samples: int = 4096
    offload: str = "cpu"
    scheme: str = "cascade"
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One limit.

    Attributes:
        limit: max_memory, GiB.
        peak: above what the process used before, GiB.
        ratio: of the peak to the limit.
        seconds: taken.
        layer: that took most.
        reduced: layers with fewer rows than asked for.
    """

    limit: float
    peak: float
    ratio: float
    seconds: float
    layer: str
    reduced: int

    def __str__(self) -> str:
        """One line."""
        most = f"most at {self.layer}, {self.reduced} layers with fewer rows"
        return f"{self.limit:5.2f} GiB  {self.peak:5.2f}  {self.ratio:5.2f}  {self.seconds:7.1f} s  {most}"


def rows(settings: Settings) -> Iterator[Row]:
    """The limits in turn."""
    context = multiprocessing.get_context("spawn")
    for limit in settings.limits:
        with ProcessPoolExecutor(1, context) as pool:
            yield pool.submit(_row, settings, limit).result()


def _row(settings: Settings, limit: float) -> Row:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(settings.network, weights=None).eval()
    with torch.no_grad():  # so that the libraries' own buffers are there before
        model(torch.zeros(1, 3, settings.size, settings.size))
    shape = (settings.batch, 3, settings.size, settings.size)
    batches = (torch.randn(shape) for _ in range(settings.images // settings.batch))
    result = trim(
        model, batches, sparsity=0.8, allocate="uniform", num_samples=settings.samples, max_memory=limit,
        offload=settings.offload, scheme=settings.scheme, targets=list(settings.targets) or None,
    )  # fmt: skip
    most = max(result.reports, key=lambda report: report.memory or 0.0)
    peak = result.peak_memory or 0.0
    reduced = sum("fit into max_memory" in note for note in result.notes)
    return Row(limit, peak, peak / limit, result.seconds, most.name, reduced)


def table(rows: Sequence[Row]) -> str:
    """A line for each limit."""
    return "\n".join(["limit        peak  ratio  seconds", *map(str, rows)])
