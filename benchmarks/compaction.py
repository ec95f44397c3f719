"""Networks of torchvision without every second unit of each group: the same outputs, fewer operations."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import latency
from benchmarks.exports import exported_outputs, onnx_outputs
from benchmarks.planting import plant_unread_units, randomize
from lightning_nettrim import compact, load_compact
from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.compaction import CompactResult
from lightning_nettrim.layers import find_layers
from lightning_nettrim.pruning.units.costs import count_macs
from lightning_nettrim.pruning.units.graph import coupled_with, dependency_graph
from lightning_nettrim.pruning.units.groups import find_groups

SIZES = (64, 70, 75, 224)
"""Height and width of the images in pixels: the first one that a network allows."""

INPUTS = 2
"""Number of images."""


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        out: folder of the results.
        networks: names of torchvision's classification networks; all, if there are none.
        onnx: export each compact network to ONNX and run it in ONNX Runtime.
        largest: networks with more parameters, in millions, are left out.
        latency: in place of all this, measure the time of a forward pass before and after compaction.
    """

    out: Path = Path("runs") / "benchmarks"
    networks: tuple[str, ...] = ()
    onnx: bool = False
    largest: int = 250
    latency: bool = False


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        network: its name.
        size: height and width of the images in pixels.
        error: of the outputs of the compact network, relative to the norm of those of the network with all units.
        macs: fraction of the multiply-accumulates that is left.
        parameters: fraction of the parameters that is left.
        groups: number of groups of which half of the units are removed.
        skipped: number of groups that are left as they are.
        kept_macs: fraction of the multiply-accumulates in layers whose outputs are all kept, by reason.
        reloaded: whether a new network has the same state and outputs after `load_compact`.
        exported: error of the compact network after `torch.export`.
        onnx: the same in ONNX Runtime.
        seconds: time to find the groups and to compact the network.
        failure: what went wrong, if anything.
    """

    network: str
    size: int
    error: float = float("nan")
    macs: float = float("nan")
    parameters: float = float("nan")
    groups: int = 0
    skipped: int = 0
    kept_macs: str = ""
    reloaded: bool | None = None
    exported: float = float("nan")
    onnx: float = float("nan")
    seconds: float = float("nan")
    failure: str = ""

    def __str__(self) -> str:
        """One line of the log."""
        return (
            f"{self.network:20} {self.size:4} {self.error:8.1e} {self.macs:6.1%} {self.parameters:6.1%} {self.groups:4}"
            f" {self.skipped:4} {self.reloaded!s:>5} {self.exported:8.1e} {self.onnx:8.1e} {self.seconds:7.1f}"
            f" {self.kept_macs} {self.failure}"
        ).rstrip()


def rows(settings: Settings) -> Iterator[Row | latency.Row]:
    """Every network."""
    if settings.latency:
        yield from latency.rows()
        return
    for name in settings.networks or torchvision.models.list_models(module=torchvision.models):
        size = smallest_size(name)
        parameters = sum(p.numel() for p in network(name, size).parameters())
        if parameters > settings.largest * 1e6:
            yield Row(name, size, failure=f"not run: {parameters / 1e6:.0f} million parameters")
            continue
        try:
            yield _row(name, size, settings.onnx)
        except Exception as error:  # whatever a network raises is a result
            reason = str(error).splitlines()[0] if str(error) else ""
            yield Row(name, size, failure=f"{type(error).__name__}: {reason}")


def smallest_size(name: str) -> int:
    """The first of SIZES that a network allows."""
    for size in SIZES[:-1]:
        try:
            network(name, size).to("meta")(torch.empty(INPUTS, 3, size, size, device="meta"))
        except (RuntimeError, ValueError, AssertionError):
            continue
        return size
    return SIZES[-1]


def network(name: str, size: int) -> nn.Module:
    """A network of torchvision with random weights, without auxiliary outputs, in evaluation mode.

    Args:
        name: of the network.
        size: height and width of its images in pixels.
    """
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": size}
    elif name.startswith("maxvit_"):
        options = {"input_size": (size, size)}
    return torchvision.models.get_model(name, weights=None, **options).eval()


def _row(name: str, size: int, onnx: bool) -> Row:
    torch.manual_seed(0)
    model, images = network(name, size), torch.randn(8, 3, size, size)
    randomize(model, images)
    images = images[:INPUTS]
    batch, start = CalibrationBatch(images), time.perf_counter()
    layers, _ = find_layers(model)
    groups, skipped = find_groups(model, batch, layers)
    plant_unread_units(layers, groups, {name: torch.arange(0, group.size, 2) for name, group in groups.items()})
    result = compact(model, images, batch_sizes=())
    report = result.report
    with torch.no_grad():
        outputs, compact_outputs = model(images), result.model(images)
    row = Row(
        name,
        size,
        error=relative_error(compact_outputs, outputs),
        macs=report.after.macs / report.before.macs,
        parameters=report.after.parameters / report.before.parameters,
        groups=len(report.units),
        skipped=len(report.skipped),
        kept_macs=_kept_macs(model, batch, report.skipped),
        seconds=time.perf_counter() - start,
    )
    if unplanned := set(report.skipped) - set(skipped):
        reasons = "; ".join(f"{group}: {report.skipped[group]}" for group in sorted(unplanned))
        row = replace(row, failure=f"cannot be removed: {reasons}")
    row = replace(row, reloaded=_is_reloaded(result, network(name, size), images))
    try:
        row = replace(row, exported=relative_error(exported_outputs(result.model, images), outputs))
        if onnx:
            row = replace(row, onnx=relative_error(onnx_outputs(result.model, images), outputs))
    except Exception as error:  # whatever the exporter raises is a result
        row = replace(row, failure=f"{row.failure} export: {type(error).__name__}: {error}".strip().splitlines()[0])
    return row


def relative_error(outputs: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of the expected outputs."""
    return float((outputs - expected).norm() / expected.norm())


@torch.no_grad()
def _is_reloaded(result: CompactResult, fresh: nn.Module, images: Tensor) -> bool:
    """Whether a file of the compact network gives the same state and outputs, bit by bit."""
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "compact.safetensors")
        loaded = load_compact(fresh, Path(folder) / "compact.safetensors")
    expected, state = result.model.state_dict(), loaded.state_dict()
    same = list(expected) == list(state) and all(torch.equal(expected[key], state[key]) for key in expected)
    return same and torch.equal(loaded(images), result.model(images))


def _kept_macs(model: nn.Module, batch: CalibrationBatch, skipped: Mapping[str, str]) -> str:
    """The fraction of the multiply-accumulates in the layers that compute the units of skipped groups, by reason.

    Those that are not in linear layers and convolutions are of the attention.
    """
    names = {module: name for name, module in model.named_modules()}
    convolutions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }
    macs, total = count_macs(model, batch, convolutions)
    graph, kept = dependency_graph(model, batch), Counter(attention=total - sum(macs.values()))
    for name, reason in skipped.items():
        items = coupled_with(graph, model.get_submodule(name)) or ()
        producers = {name, *(names[item.module] for item in items if item.computes and item.module in names)}
        kept[kind_of(reason)] += sum(macs.get(producer, 0.0) for producer in producers)
    return "; ".join(f"{kind} {count / total:.1%}" for kind, count in kept.most_common() if count > 0)


def kind_of(reason: str) -> str:
    """A reason without the name of the layer."""
    if reason in ("no layer reads its units", "its units are an output of the network"):
        return "output"
    reason = re.sub(r"^\S+ (is|has) (an? )?", "", reason)
    return re.sub(r" with .*|, which .*|: .*", "", reason)


def table(rows: Sequence[Any]) -> str:
    """One line for each network, and the sum over them."""
    if isinstance(rows[0], latency.Row):
        return latency.table(rows)
    head = f"{'network':20} {'size':>4} {'error':>8} {'MACs':>6} {'param.':>6} {'gr.':>4} {'skip':>4} {'file':>5}"
    head += f" {'export':>8} {'ONNX':>8} {'s':>7} MACs of layers whose outputs are all kept"
    done = [row for row in rows if not row.failure]
    worst = max((row.error for row in done), default=float("nan"))
    return "\n".join([head, *map(str, rows), f"{len(done)} of {len(rows)} networks, largest error {worst:.1e}"])
