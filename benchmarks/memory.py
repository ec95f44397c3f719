"""Peak memory while a large network is pruned, for several values of ``max_memory``, each in its own process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import larger_than_memory
from lightning_nettrim import PruningResult, trim
from lightning_nettrim.runtime.memory import GIB


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        out: folder of the results.
        network: name of a torchvision model; its weights are random.
        limits: values of ``max_memory``, in GiB; if there are none, 1 with ``larger_than_memory``, else 1.5, 2 and 3.
        images: number of random calibration images.
        size: height and width of an image, in pixels.
        batch: number of images per batch.
        samples: maximum number of calibration inputs (``num_samples``).
        offload: where calibration inputs and reference outputs are kept.
        scheme: ``cascade`` or ``parallel``.
        targets: layers to prune, by name or glob; all if empty.
        larger_than_memory: prune a Llama whose weights are on disk, block by block, in place of ``network``.
        dim: number of features of this Llama.
        depth: number of its blocks.
    """

    out: Path = Path("runs") / "benchmarks"
    network: str = "resnet50"
    limits: tuple[float, ...] = ()
    images: int = 128
    size: int = 224
    batch: int = 32
    samples: int = 4096
    offload: str = "cpu"
    scheme: str = "cascade"
    targets: tuple[str, ...] = ()
    larger_than_memory: bool = False
    dim: int = 1024
    depth: int = 24


@dataclass(frozen=True)
class Row:
    """The result for one limit.

    Attributes:
        limit: ``max_memory``, in GiB.
        peak: peak of additional memory of the process, in GiB.
        ratio: peak over limit.
        weights: of the network, in GiB.
        seconds: run time.
        peak_layer: the layer with the largest peak.
        reduced_layers: number of layers with fewer rows than requested, for lack of memory.
    """

    limit: float
    peak: float
    ratio: float
    weights: float
    seconds: float
    peak_layer: str
    reduced_layers: int

    def __str__(self) -> str:
        """One line of the table."""
        numbers = f"{self.limit:11.2f}  {self.peak:10.2f}  {self.ratio:5.2f}  {self.weights:13.2f}  {self.seconds:8.1f}"
        return f"{numbers}  {self.reduced_layers:14d}  {self.peak_layer}"


def rows(settings: Settings) -> Iterator[Row]:
    """One row for each limit."""
    context = multiprocessing.get_context("spawn")
    for limit in settings.limits or ((1.0,) if settings.larger_than_memory else (1.5, 2.0, 3.0)):
        with ProcessPoolExecutor(1, context) as pool:
            yield pool.submit(_row, settings, limit).result()


def _row(settings: Settings, limit: float) -> Row:
    if settings.larger_than_memory:
        result, weights = larger_than_memory.prune(limit, settings.dim, settings.depth, settings.scheme)
    else:
        result, weights = _prune(settings, limit)
    largest = max(result.reports, key=lambda report: report.memory or 0.0)
    peak = result.peak_memory or 0.0
    reduced = sum("fit into max_memory" in note for note in result.notes)
    return Row(limit, peak, peak / limit, weights, result.seconds, largest.name, reduced)


def _prune(settings: Settings, limit: float) -> tuple[PruningResult, float]:
    """Prune a model of torchvision; the result, and the GiB of its weights."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(settings.network, weights=None).eval()
    with torch.no_grad():  # allocates the buffers of the libraries before the measurement begins
        model(torch.zeros(1, 3, settings.size, settings.size))
    shape = (settings.batch, 3, settings.size, settings.size)
    batches = (torch.randn(shape) for _ in range(settings.images // settings.batch))
    result = trim(
        model, batches, sparsity=0.8, allocate="uniform", num_samples=settings.samples, max_memory=limit,
        offload=settings.offload, scheme=settings.scheme, targets=list(settings.targets) or None,
    )  # fmt: skip
    return result, sum(p.numel() * p.element_size() for p in model.parameters()) / GIB


def table(rows: Sequence[Row]) -> str:
    """One line for each limit."""
    return "\n".join(
        ["limit (GiB)  peak (GiB)  ratio  weights (GiB)   seconds  reduced layers  peak layer", *map(str, rows)]
    )
