"""The output of a benchmark: a header with the machine, rows as text, and a CSV file."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One measurement; ``None`` where a value does not apply.

    Attributes:
        section: section of the benchmark; rows of "trace" are the points of the plot and are not printed.
        instance: the problem that was solved.
        solver: name of the solver.
        steps: number of steps.
        seconds: run time.
        gap: relative to the optimum, or to the lower bound if the note says so.
        violation: of the constraints, relative to ε.
        ratio: run time relative to the one that the note names.
        note: further information.
    """

    section: str
    instance: str
    solver: str
    steps: int | None = None
    seconds: float | None = None
    gap: float | None = None
    violation: float | None = None
    ratio: float | None = None
    note: str = ""


WIDTHS = {"section": 8, "instance": 36, "solver": 16, "steps": 6, "seconds": 10, "gap": 10, "violation": 10, "ratio": 8}


def header(device: str) -> str:
    """Date, command and machine, one line each."""
    return "\n".join(
        (
            f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
            shlex.join([Path(sys.executable).name, "-m", "benchmarks.run", *sys.argv[1:]]),
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"Python {platform.python_version()}, torch {torch.__version__}, {device}",
        )
    )


def column_titles() -> str:
    """The header line of the table."""
    return _aligned([*WIDTHS], "note")


def line(row: Row) -> str:
    """One line of the table."""
    return _aligned([_cell(value) for value in astuple(row)[:-1]], row.note)


def write(rows: Sequence[Any], path: Path) -> None:
    """Write the rows, instances of one dataclass, as CSV with unrounded numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(f.name for f in fields(rows[0]))
        writer.writerows(astuple(row) for row in rows)


def _cell(value: str | float | None) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _aligned(cells: list[str], note: str) -> str:
    columns = zip(WIDTHS.items(), cells, strict=True)
    left_aligned = ("section", "instance", "solver")
    padded = [cell.ljust(width) if name in left_aligned else cell.rjust(width) for (name, width), cell in columns]
    return " ".join([*padded, note]).rstrip()
