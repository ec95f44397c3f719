"""The race as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.peers import Unavailable
from benchmarks.race import TOLERANCE
from benchmarks.report import Row


def draw(rows: Iterable[Row], path: Path) -> None:
    """Error against seconds on logarithmic axes, a line for each solver, from the rows of "trace".

    The error is the larger of the objective's, relative to the optimum, and the violation.

    Raises:
        Unavailable: if Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable("no picture without Matplotlib: pip install -e '.[bench]'") from error
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.section == "trace":
            label = f"{row.solver}, {row.instance}"
            lines.setdefault(label, []).append((row.seconds, max(abs(row.gap), row.violation)))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="seconds", ylabel="objective error or violation")
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.axhline(TOLERANCE, color="grey", linestyle=":")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
