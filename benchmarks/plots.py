"""Plots of the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.coreset import Row as CoresetRow
from benchmarks.oneshot import Row as OneShotRow
from benchmarks.peers import Unavailable
from benchmarks.report import Row
from benchmarks.time_to_tolerance import TOLERANCE


def plot_convergence(rows: Iterable[Row], path: Path) -> None:
    """Plot the error against seconds on logarithmic axes, one line per solver, from the rows of section "trace".

    The error is the larger of |gap| and violation.

    Args:
        rows: of the benchmark ``convex``.
        path: PNG file to write.

    Raises:
        Unavailable: if Matplotlib is not installed.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.section == "trace":
            label = f"{row.solver}, {row.instance}"
            lines.setdefault(label, []).append((row.seconds, max(abs(row.gap), row.violation)))
    labels = {"xscale": "log", "yscale": "log", "xlabel": "seconds", "ylabel": "max(|gap|, violation)"}
    _plot(lines, path, TOLERANCE, **labels)


def plot_accuracy(rows: Iterable[OneShotRow], path: Path) -> None:
    """Plot the accuracy against the sparsity, one line per method, means over the seeds.

    Args:
        rows: of the benchmark ``oneshot``.
        path: PNG file to write.

    Raises:
        Unavailable: if Matplotlib is not installed.
    """
    lines: dict[str, dict[str, list[OneShotRow]]] = {}
    for row in rows:
        if ":" not in row.budget and row.method != "dense":
            lines.setdefault(row.method, {}).setdefault(row.budget, []).append(row)
    means = {
        method: [(fmean(r.sparsity for r in group), fmean(r.accuracy for r in group)) for group in groups.values()]
        for method, groups in lines.items()
    }
    _plot(means, path, None, xlabel="sparsity", ylabel="accuracy in percent", ylim=(90, 99))


def plot_coresets(rows: Iterable[CoresetRow], path: Path) -> None:
    """Plot the error against the size on logarithmic axes, one line per method.

    Args:
        rows: of the benchmark ``coreset``.
        path: PNG file to write.

    Raises:
        Unavailable: if Matplotlib is not installed.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row.method, []).append((row.size, row.error))
    labels = {"xscale": "log", "yscale": "log", "xlabel": "neurons", "ylabel": "relative error"}
    _plot(lines, path, None, **labels)


def _plot(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path, level: float | None, **axis: Any) -> None:
    """Write a line plot, with a horizontal line at ``level``."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable("the plot needs Matplotlib: pip install -e '.[bench]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(**axis)
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    if level is not None:
        axes.axhline(level, color="grey", linestyle=":")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
