"""The network without the units that no layer reads, and what it saves."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_nettrim.calibration.batch import CalibrationBatch, Forward, call
from lightning_nettrim.calibration.nested import common_length, count_inputs
from lightning_nettrim.compaction.files import save_compact
from lightning_nettrim.compaction.unread import find_unread
from lightning_nettrim.pruning.results import aligned
from lightning_nettrim.pruning.units.costs import count_macs
from lightning_nettrim.pruning.units.graph import TRACED_INPUTS
from lightning_nettrim.pruning.units.latency import milliseconds
from lightning_nettrim.pruning.units.surgery import RemovedChannels, without_channels


@dataclass(frozen=True)
class NetworkSize:
    """The size and the speed of a network.

    Attributes:
        parameters: number of parameters.
        size: bytes of all parameters and buffers.
        macs: multiply-accumulates per input.
        milliseconds: ``{batch size: median time of a forward pass}``.
    """

    parameters: int
    size: int
    macs: float
    milliseconds: Mapping[int, float]

    def numbers(self) -> dict[str, float]:
        """The numbers by name."""
        times = {f"milliseconds at batch {size}": value for size, value in self.milliseconds.items()}
        return {"parameters": self.parameters, "MACs": self.macs, "bytes": self.size} | times


@dataclass(frozen=True)
class CompactionReport:
    """What a network without its unread units saves.

    Attributes:
        removed: ``{module: channels}`` that can be removed.
        units: ``{group: (number of units that are kept, number of units)}``.
        skipped: ``{group: reason}`` of the groups of which nothing can be removed.
        before: size and speed of the network with all units.
        after: size and speed of the compact network.
    """

    removed: Mapping[str, RemovedChannels]
    units: Mapping[str, tuple[int, int]]
    skipped: Mapping[str, str]
    before: NetworkSize
    after: NetworkSize

    def table(self) -> str:
        """Both networks side by side, followed by the units of each group and the reasons for the skipped ones."""
        before, after = self.before.numbers(), self.after.numbers()
        rows = [("", "all units", "compact", "ratio")]
        for name, value in before.items():
            form = ",.2f" if name.startswith("milliseconds") else ",.0f"
            rows.append((name, format(value, form), format(after[name], form), f"{value / max(after[name], 1e-9):.2f}"))
        units = ", ".join(f"{name} {kept} of {size}" for name, (kept, size) in self.units.items())
        reasons = [f"units of {name} are all kept: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([aligned(rows), f"units kept: {units or 'all'}", *reasons])


@dataclass(frozen=True, eq=False)
class CompactResult:
    """A compact network.

    Attributes:
        model: the network without its unread units.
        report: what it saves.
    """

    model: nn.Module
    report: CompactionReport

    def table(self) -> str:
        """Both networks side by side, as text."""
        return self.report.table()

    def __str__(self) -> str:
        """The table."""
        return self.table()

    def save(self, path: str | Path) -> None:
        """Write the compact network to a safetensors file that `load_compact` reads."""
        save_compact(self.model, self.report.removed, path)


def compact(
    model: nn.Module, example_input: Any, *, forward: Forward = call, batch_sizes: Sequence[int] = (1,)
) -> CompactResult:
    """Remove the units that no layer reads; the output stays the same.

    A unit is a neuron or a channel, with everything that is computed for it. It is not read if all weights for it are
    zero in all layers that read it, as after ``trim(pattern="units")``. Torch-Pruning finds what belongs together.

    Args:
        model: the pruned model; it is not changed.
        example_input: a batch; see `trim` for its forms.
        forward: runs a batch through a model.
        batch_sizes: batch sizes at which the time of a forward pass is measured.

    Raises:
        ModuleNotFoundError: without the package torch-pruning, of the extra ``compact``.
        ValueError: if the forward pass cannot be traced.
    """
    report = report_compaction(model, CalibrationBatch(example_input, forward), batch_sizes)
    trainer = getattr(model, "_trainer", None)  # a LightningModule refers to its Trainer, which is not copied
    with without_channels(model, report.removed):
        return CompactResult(copy.deepcopy(model, {} if trainer is None else {id(trainer): None}), report)


def report_compaction(model: nn.Module, batch: CalibrationBatch, batch_sizes: Sequence[int]) -> CompactionReport:
    """Find what can be removed from a network and measure what it saves; the model is not changed.

    Args:
        model: the pruned model.
        batch: a batch.
        batch_sizes: batch sizes at which the time of a forward pass is measured; that of the batch, if it cannot be
            divided.

    Raises:
        ModuleNotFoundError: without the package torch-pruning, of the extra ``compact``.
        ValueError: if the forward pass cannot be traced.
    """
    length = common_length(batch.batch)
    small = batch.part(slice(TRACED_INPUTS)) if length is not None and length > TRACED_INPUTS else batch
    unread = find_unread(model, small)
    before = measure(model, batch, batch_sizes)
    with without_channels(model, unread.removed):
        after = measure(model, batch, batch_sizes)
    return CompactionReport(unread.removed, unread.units, unread.skipped, before, after)


def measure(model: nn.Module, batch: CalibrationBatch, batch_sizes: Sequence[int]) -> NetworkSize:
    """The size and the speed of a network.

    Args:
        model: the model.
        batch: a batch; its inputs are repeated for other batch sizes.
        batch_sizes: at which the time of a forward pass is measured.
    """
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _, macs = count_macs(model, batch, {})
    divisible = common_length(batch.batch) is not None
    times = {}
    for count in batch_sizes if divisible else [count_inputs(batch.batch)][: len(batch_sizes)]:
        times[count] = milliseconds(model, batch.repeated(count) if divisible else batch)
    return NetworkSize(parameters, size, macs, times)
