"""What a benchmark says: rows, the machine that they were measured on, and a file of each."""

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
    """One measurement; what does not apply is None.

    Attributes:
        section: of the benchmark; rows of "trace" are the points of the picture and are not printed.
        instance: what was solved.
        solver: by whom.
        steps: taken.
        seconds: taken.
        gap: relative to the optimum, or to the bound where the note says so.
        violation: of the constraints, relative to ε.
        ratio: of the seconds to those that the note names.
        note: the rest, in words.
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


WIDTHS = {"section": 8, "instance": 28, "solver": 16, "steps": 6, "seconds": 10, "gap": 10, "violation": 10, "ratio": 8}


def header(device: str) -> str:
    """Date, command and machine, a line each."""
    return "\n".join(
        (
            f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
            shlex.join([Path(sys.executable).name, "-m", "benchmarks.run", *sys.argv[1:]]),
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"Python {platform.python_version()}, torch {torch.__version__}, {device}",
        )
    )


def titles() -> str:
    """The names of the columns."""
    return _aligned([*WIDTHS], "note")


def line(row: Row) -> str:
    """One row of the table."""
    return _aligned([_cell(value) for value in astuple(row)[:-1]], row.note)


def write(rows: Sequence[Any], path: Path) -> None:
    """All rows, of one dataclass, as CSV, numbers in full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(f.name for f in fields(rows[0]))
        writer.writerows(astuple(row) for row in rows)


def _cell(value: str | float | None) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _aligned(cells: list[str], note: str) -> str:
    columns = zip(WIDTHS.items(), cells, strict=True)
    words = ("section", "instance", "solver")
    padded = [cell.ljust(width) if name in words else cell.rjust(width) for (name, width), cell in columns]
    return " ".join([*padded, note]).rstrip()
