"""What pruning returns: a report for each layer and for the network, and its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerReport:
    """The result of one layer, measured on the calibration set.

    Attributes:
        name: name of the layer in the model.
        type: class of its module.
        shape: shape of its weight.
        sparsity: fraction of exact zeros among its prunable weights.
        zeros: number of exact zeros among its prunable weights.
        local_error: ‖Y_pruned − Y‖/‖Y‖ of its response on the inputs it was solved for, after the refit.
        end_to_end_error: the same in the pruned network, with the errors of all layers before it.
        objective: ‖W‖₁ of the solution of the convex program, before the refit; ``None`` without a certificate, as the
            next three.
        bound: certified lower bound of the optimum of that program.
        duality_gap: (objective − bound) / objective.
        violation: of the constraints of that program, relative to its radius.
        epsilon: radius of the program relative to ‖Y‖; ``None`` if there is none.
        pattern: of the zeros.
        steps: number of steps of the solver.
        seconds: for recording, solving and refitting.
        status: CONVERGED, MAX_STEPS, INFEASIBLE or NONFINITE; ``None`` for methods without a certificate.
        fallback: what was done instead of a failed solve, and why it failed; empty if it did not fail.
        memory: peak of additional memory in GiB; ``None`` if it was not measured.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    sparsity: float
    zeros: int
    local_error: float
    end_to_end_error: float
    objective: float | None
    bound: float | None
    duality_gap: float | None
    violation: float | None
    epsilon: float | None
    pattern: str
    steps: int
    seconds: float
    status: str | None
    fallback: str = ""
    memory: float | None = None

    def scalars(self) -> dict[str, float]:
        """The numbers for charts, by name."""
        names = (
            "sparsity",
            "local_error",
            "end_to_end_error",
            "duality_gap",
            "violation",
            "steps",
            "seconds",
            "memory",
        )
        values = {name: getattr(self, name) for name in names}
        return {name: float(value) for name, value in values.items() if value is not None}

    def line(self) -> str:
        """One line for a log."""
        gap = "" if self.duality_gap is None else f", duality gap {self.duality_gap:.1e}"
        memory = "" if self.memory is None else f", {self.memory:.2f} GiB"
        status = "" if self.status is None else f", {self.status}"
        fallback = f"; {self.fallback}" if self.fallback else ""
        return (
            f"{self.name}: sparsity {self.sparsity:.1%}, local error {self.local_error:.2%}{gap},"
            f" {self.steps} steps, {self.seconds:.1f} s{memory}{status}{fallback}"
        )


@dataclass(frozen=True)
class SkippedLayer:
    """A layer with a weight matrix that was left dense.

    Attributes:
        name: name of the layer in the model.
        reason: why.
        weights: number of values in its matrices.
    """

    name: str
    reason: str
    weights: int = 0


@dataclass(frozen=True)
class Trial:
    """One network of a search for the sparsest network within a drop of the metric.

    Attributes:
        sparsity: of the layers that share it.
        metric: of the network.
        within: whether the metric is within the drop.
    """

    sparsity: float
    metric: float
    within: bool

    def line(self) -> str:
        """One line for a log."""
        verdict = "within the drop" if self.within else "not within the drop"
        return f"trial at sparsity {self.sparsity:.2%}: metric {self.metric:.4f}, {verdict}"


@dataclass(frozen=True)
class RecoveryReport:
    """What a recovery has changed.

    Attributes:
        loss: name of the loss.
        loss_before: loss of the pruned network, on calibration inputs that were held out.
        loss_after: of the recovered network; equal to ``loss_before`` if nothing has improved.
        end_to_end_error_before: of the pruned network, on the calibration set; NaN until it is measured.
        steps: number of steps up to the best iterate; summed over the windows of a recovery by blocks.
        seconds: in total.
    """

    loss: str
    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    end_to_end_error_before: float = float("nan")

    def line(self, end_to_end_error: float) -> str:
        """One line for a log."""
        return (
            f"recovery: end-to-end error {self.end_to_end_error_before:.4f} → {end_to_end_error:.4f},"
            f" held-out loss ({self.loss}) {self.loss_before:.3g} → {self.loss_after:.3g}, {self.steps} steps,"
            f" {self.seconds:.1f} s"
        )


@dataclass(frozen=True, eq=False)
class PruningResult:
    """The result of pruning a network.

    Attributes:
        reports: one per pruned layer, in order of execution.
        skipped: every other layer with a weight matrix.
        masks: ``{parameter name: bool tensor}``, True where the weight is kept.
        sparsity: fraction of exact zeros among the prunable weights of the pruned layers.
        model_sparsity: fraction of exact zeros among all parameters of the model.
        end_to_end_error: ‖Y_pruned − Y‖/‖Y‖ of the last pruned layer's response, in the pruned network.
        end_to_end_bound: certified upper bound of it, Σ ε̂ℓ Π_{j>ℓ} ‖Ŵⱼ‖₂ / ‖Y‖, where the pruned layers are a chain of
            matrices and ReLUs; ``None`` where they are not.
        output_distance: ‖Y_pruned − Y‖ of the last pruned layer's response.
        output_norm: ‖Y‖ of the last pruned layer's response.
        seconds: in total.
        recovery: what the recovery has changed; ``None`` without one.
        trials: of a search within a drop of the metric, the dense network first; else empty.
        plan: the budgets as YAML, which ``plan=`` reads.
        peak_memory: additional memory of the device or, on the CPU, of the process, in GiB.
        notes: remarks, such as fewer samples for lack of memory or results of an interrupted run.
        reused: files of finished layers of interrupted runs that were used.
    """

    reports: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    masks: dict[str, Tensor]
    sparsity: float
    model_sparsity: float
    end_to_end_error: float
    end_to_end_bound: float | None
    output_distance: float
    output_norm: float
    seconds: float
    recovery: RecoveryReport | None = None
    trials: tuple[Trial, ...] = ()
    plan: str = ""
    peak_memory: float | None = None
    notes: tuple[str, ...] = ()
    reused: tuple[Path, ...] = ()

    @classmethod
    def of_dry_run(cls, skipped: tuple[SkippedLayer, ...]) -> PruningResult:
        """The result of a dry run, in which nothing is pruned."""
        return cls((), skipped, {}, 0.0, 0.0, 0.0, None, 0.0, 0.0, 0.0)

    def to_primitives(self) -> dict[str, Any]:
        """Everything but the masks and the files, for a checkpoint."""
        return asdict(replace(self, masks={}, reused=()))

    @classmethod
    def from_primitives(cls, values: Mapping[str, Any], masks: dict[str, Tensor]) -> PruningResult:
        """The result whose `to_primitives` these are."""
        recovery = values["recovery"]
        parts = {
            "reports": tuple(LayerReport(**each) for each in values["reports"]),
            "skipped": tuple(SkippedLayer(**each) for each in values["skipped"]),
            "trials": tuple(Trial(**each) for each in values["trials"]),
            "recovery": None if recovery is None else RecoveryReport(**recovery),
        }
        return cls(**{**values, **parts, "masks": masks})

    def total(self) -> dict[str, float | None]:
        """The numbers of the whole network, by name."""
        names = (
            "sparsity", "model_sparsity", "end_to_end_error", "end_to_end_bound", "output_distance", "output_norm",
            "seconds", "peak_memory",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def table(self) -> str:
        """The layers as an aligned text table, followed by the whole network, notes, trials and skipped layers."""
        lines = [layer_table(self.reports)]
        bound = "" if self.end_to_end_bound is None else f" (certified: at most {self.end_to_end_bound:.4f})"
        lines.append(
            f"sparsity of the pruned layers {self.sparsity:.2%}, of the whole model {self.model_sparsity:.2%};"
            f" end-to-end error {self.end_to_end_error:.4f}{bound}; {self.seconds:.1f} s"
            + ("" if self.peak_memory is None else f"; peak of additional memory {self.peak_memory:.2f} GiB")
        )
        lines += [f"{report.name}: {report.fallback}" for report in self.reports if report.fallback]
        lines += [] if self.recovery is None else [self.recovery.line(self.end_to_end_error)]
        lines += self.notes
        lines += [trial.line() for trial in self.trials]
        lines += [f"skipped {layer.name or '(the model)'}: {layer.reason}" for layer in self.skipped]
        return "\n".join(lines)

    def __str__(self) -> str:
        """The table."""
        return self.table()


def layer_table(reports: Sequence[LayerReport]) -> str:
    """One aligned line per layer; columns that no layer has are left out."""

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    columns: dict[str, list[str]] = {
        "layer": [report.name for report in reports],
        "weight shape": ["×".join(map(str, report.shape)) for report in reports],
        "zeros": [f"{report.zeros}" for report in reports],
        "sparsity": [f"{report.sparsity:.2%}" for report in reports],
        "local error": [f"{report.local_error:.4f}" for report in reports],
        "end-to-end error": [f"{report.end_to_end_error:.4f}" for report in reports],
        "duality gap": [cell(report.duality_gap, ".1e") for report in reports],
        "violation": [cell(report.violation, ".1e") for report in reports],
        "steps": [f"{report.steps}" for report in reports],
        "seconds": [f"{report.seconds:.1f}" for report in reports],
        "status": [report.status or "–" for report in reports],
    }
    shown = {title: cells for title, cells in columns.items() if not cells or any(text != "–" for text in cells)}
    return aligned([list(shown), *zip(*shown.values(), strict=True)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a text table; the first row is the head, the first column is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def comparison(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics that all networks have side by side, with the difference of the last one to the first.

    Args:
        metrics: of each network by its name.
    """
    first, *others = metrics.values()
    rows = [("metric", *metrics, "difference")]
    for name in first:
        if all(name in other for other in others):
            values = [side[name] for side in metrics.values()]
            rows.append((name, *(f"{value:.4f}" for value in values), f"{values[-1] - values[0]:+.4f}"))
    return aligned(rows)
