"""Report: one row per layer and the whole, as text, as JSON and as TensorBoard summaries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer, measured on the calibration sample.

    Attributes:
        name: the layer's name in the model.
        type: its class.
        shape: of its weight.
        sparsity: fraction of exact zeros among its prunable weights.
        zeros: number of exact zeros among its prunable weights.
        relative_error: ‖answer − trained answer‖ / ‖trained answer‖ on the inputs it was solved for, after refit.
        discrepancy: the same once the whole network is pruned.
        objective: ‖W‖₁ of the convex program's answer (before refit); None for methods without one.
        bound: certified lower bound of that program's optimum.
        duality_gap: (objective − bound) / objective.
        violation: of the program's constraints by its answer, relative to its radius.
        epsilon: radius of the program relative to ‖Y‖.
        pattern: of its zeros.
        steps: of the solver.
        seconds: recording, solving and refitting.
        status: CONVERGED, MAX_STEPS, INFEASIBLE or NONFINITE.
        fallback: what was done instead of a failed solve, and why it failed; empty where none did.
        memory: peak above what was in use at the beginning, GiB; None where it was not measured.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    sparsity: float
    zeros: int
    relative_error: float
    discrepancy: float
    objective: float | None
    bound: float | None
    duality_gap: float | None
    violation: float | None
    epsilon: float | None
    pattern: str
    steps: int
    seconds: float
    status: str
    fallback: str = ""
    memory: float | None = None

    def scalars(self) -> dict[str, float]:
        """The numbers that are worth a chart, by name."""
        names = ("sparsity", "relative_error", "discrepancy", "duality_gap", "violation", "steps", "seconds", "memory")
        values = {name: getattr(self, name) for name in names}
        return {name: float(value) for name, value in values.items() if value is not None}

    def line(self) -> str:
        """One line for a log."""
        gap = "" if self.duality_gap is None else f", duality gap {self.duality_gap:.1e}"
        memory = "" if self.memory is None else f", {self.memory:.2f} GiB"
        fallback = f"; {self.fallback}" if self.fallback else ""
        return (
            f"{self.name}: {self.sparsity:.1%} zeros, response error {self.relative_error:.2%}{gap},"
            f" {self.steps} steps, {self.seconds:.1f} s{memory}, {self.status}{fallback}"
        )


@dataclass(frozen=True)
class SkippedLayer:
    """A layer with a weight matrix that was left alone, why, and how many values its matrices have."""

    name: str
    reason: str
    weights: int = 0


@dataclass(frozen=True)
class Trial:
    """One network tried by a search: its sparsity, its metric, and whether that is within the drop."""

    sparsity: float
    metric: float
    within: bool

    def line(self) -> str:
        """One line for a log."""
        verdict = "within the drop" if self.within else "not within the drop"
        return f"trial at {self.sparsity:.2%} zeros: metric {self.metric:.4f}, {verdict}"


@dataclass(frozen=True, eq=False)
class TrimResult:
    """What `trim` did.

    Attributes:
        reports: one per pruned layer, in order of execution.
        skipped: every other layer with a weight matrix.
        masks: ``{parameter name: bool tensor}``, True where the weight is kept.
        sparsity: fraction of exact zeros among the prunable weights of the pruned layers.
        model_sparsity: fraction of exact zeros among all parameters of the model.
        discrepancy: ‖pruned − trained‖ at the last pruned layer's response, the whole network pruned.
        discrepancy_bound: Σ ε̂ℓ Π_{j>ℓ} ‖Ŵⱼ‖₂, which the discrepancy cannot exceed where the pruned layers are a plain
            chain; None where they are not.
        response_norm: ‖trained response‖ at the last pruned layer, the unit of both.
        seconds: for everything.
        trials: of a search for the sparsest network within a drop, the trained one first; else empty.
        plan: the budgets as YAML, which ``plan=`` reads.
        peak_memory: above what was in use at the beginning, of the device or, on the CPU, of the process, GiB.
        notes: what had to be done with less: fewer samples for want of memory, results of a run that was cut short.
        reused: files of finished layers that an earlier run, which was cut short, has left elsewhere.
    """

    reports: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    masks: dict[str, Tensor]
    sparsity: float
    model_sparsity: float
    discrepancy: float
    discrepancy_bound: float | None
    response_norm: float
    seconds: float
    trials: tuple[Trial, ...] = ()
    plan: str = ""
    peak_memory: float | None = None
    notes: tuple[str, ...] = ()
    reused: tuple[Path, ...] = ()

    @classmethod
    def of_plan(cls, skipped: tuple[SkippedLayer, ...]) -> TrimResult:
        """The result of a dry run: nothing is pruned."""
        return cls((), skipped, {}, 0.0, 0.0, 0.0, None, 0.0, 0.0)

    def total(self) -> dict[str, float | None]:
        """The numbers of the whole network, by name."""
        names = ("sparsity", "model_sparsity", "discrepancy", "discrepancy_bound", "response_norm", "seconds")
        return {name: getattr(self, name) for name in (*names, "peak_memory")}

    def table(self) -> str:
        """The reports as an aligned text table, with the skipped layers and the whole network under it."""
        lines = [layer_table(self.reports)]
        bound = "" if self.discrepancy_bound is None else f" (certified: at most {self.discrepancy_bound:.4g})"
        lines.append(
            f"all pruned layers: {self.sparsity:.2%} zeros; whole model: {self.model_sparsity:.2%};"
            f" discrepancy {self.discrepancy:.4g}{bound} of {self.response_norm:.4g}; {self.seconds:.1f} s"
            + ("" if self.peak_memory is None else f"; {self.peak_memory:.2f} GiB at most")
        )
        lines += [f"{report.name}: {report.fallback}" for report in self.reports if report.fallback]
        lines += self.notes
        lines += [trial.line() for trial in self.trials]
        lines += [f"skipped {layer.name or '(the model)'}: {layer.reason}" for layer in self.skipped]
        return "\n".join(lines)

    def __str__(self) -> str:
        """The table."""
        return self.table()


def layer_table(reports: Sequence[LayerReport]) -> str:
    """One aligned line per layer."""
    columns = "layer shape zeros sparsity error discrepancy gap violation steps seconds status"
    rows = [
        (
            report.name,
            "×".join(map(str, report.shape)),
            f"{report.zeros}",
            f"{report.sparsity:.2%}",
            f"{report.relative_error:.4f}",
            f"{report.discrepancy:.4f}",
            "–" if report.duality_gap is None else f"{report.duality_gap:.1e}",
            "–" if report.violation is None else f"{report.violation:.1e}",
            f"{report.steps}",
            f"{report.seconds:.1f}",
            report.status,
        )
        for report in reports
    ]
    return aligned([columns.split(), *rows])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a text table: the first row is the head, the first column is flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def comparison(dense: Mapping[str, float], pruned: Mapping[str, float]) -> str:
    """The metrics of both networks side by side."""
    rows = [("metric", "dense", "pruned", "difference")]
    for name in dense:
        if name in pruned:
            rows.append((name, f"{dense[name]:.4f}", f"{pruned[name]:.4f}", f"{pruned[name] - dense[name]:+.4f}"))
    return aligned(rows)


def as_json(
    result: TrimResult,
    metrics: Mapping[str, Mapping[str, float]],
    arguments: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """What `report.json` holds: primitives only, None where a number is not finite."""
    return _primitive(
        {
            "layers": [asdict(report) for report in result.reports],
            "skipped": [asdict(layer) for layer in result.skipped],
            "total": result.total(),
            "trials": [asdict(trial) for trial in result.trials],
            "notes": result.notes,
            "metrics": metrics,
            "arguments": arguments,
            "versions": versions,
        }
    )


def _primitive(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _primitive(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_primitive(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def write_text(writer: SummaryWriter, result: TrimResult, metrics: str, step: int) -> None:
    """The tables, as TensorBoard text under ``nettrim/table``."""
    blocks = [block for block in (metrics, result.table()) if block]
    writer.add_text("nettrim/table", "\n\n".join("    " + b.replace("\n", "\n    ") for b in blocks), step)


def write_trials(writer: SummaryWriter, result: TrimResult, monitor: str) -> None:
    """The curve of the metric against sparsity, whose steps are hundredths of a percent of zeros."""
    for trial in sorted(result.trials, key=lambda trial: trial.sparsity):
        writer.add_scalar(f"nettrim/trials/{monitor}", trial.metric, round(1e4 * trial.sparsity))


def write_histograms(writer: SummaryWriter, weights: Mapping[str, Tensor], step: int) -> None:
    """One histogram per parameter under ``nettrim/<parameter>``, with slashes for dots before its last part."""
    for name, weight in weights.items():
        writer.add_histogram(f"nettrim/{name.replace('.weight', '/weight').replace('.bias', '/bias')}", weight, step)
