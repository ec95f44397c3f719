"""Results as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.oneshot import Row as OneShot
from benchmarks.peers import Unavailable
from benchmarks.race import TOLERANCE
from benchmarks.report import Row


def draw(rows: Iterable[Row], path: Path) -> None:
    """Error against seconds on logarithmic axes, a line for each solver, from the rows of "trace".

    The error is the larger of the objective's, relative to the optimum, and the violation.

    Raises:
        Unavailable: if Matplotlib is not installed.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.section == "trace":
            label = f"{row.solver}, {row.instance}"
            lines.setdefault(label, []).append((row.seconds, max(abs(row.gap), row.violation)))
    labels = {"xscale": "log", "yscale": "log", "xlabel": "seconds", "ylabel": "objective error or violation"}
    _draw(lines, path, TOLERANCE, **labels)


def draw_accuracy(rows: Iterable[OneShot], path: Path) -> None:
    """Accuracy against zeros, a line for each method of the one-shot benchmark, means over the seeds.

    Raises:
        Unavailable: if Matplotlib is not installed.
    """
    lines: dict[str, dict[str, list[OneShot]]] = {}
    for row in rows:
        if ":" not in row.budget and row.method != "dense":
            lines.setdefault(row.method, {}).setdefault(row.budget, []).append(row)
    means = {
        method: [(fmean(r.zeros for r in group), fmean(r.accuracy for r in group)) for group in groups.values()]
        for method, groups in lines.items()
    }
    _draw(means, path, None, xlabel="fraction of zeros", ylabel="accuracy in percent", ylim=(90, 99))


def _draw(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path, level: float | None, **axis: Any) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable("no picture without Matplotlib: pip install -e '.[bench]'") from error
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
