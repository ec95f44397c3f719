"""Time and peak memory of the solve of one layer by its inputs N, outputs M and samples P, and their exponents."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.clock import Clock
from benchmarks.steps import random_problem
from lightning_nettrim import Cardinality, Magnitude, Solver, refit, solve
from lightning_nettrim.runtime.memory import GIB, MemoryMeter

SIZES: dict[str, list[tuple[int, int, int]]] = {
    "inputs": [(N, 64, 1024) for N in (32, 128, 512, 2048, 8192, 32768)],
    "outputs": [(256, M, 1024) for M in (16, 64, 256, 1024, 4096, 16384)],
    "samples": [(256, 64, P) for P in (128, 512, 2048, 8192, 32768, 131072)],
    "large": [(65536, 128, 4096)],
}
"""N, M and P of the layers of each section."""

METHODS: dict[str, Solver] = {"magnitude + refit": Magnitude(), "Cardinality + refit": Cardinality()}


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        out: folder of the results.
        sections: what varies; ``large`` is one layer of 65536 × 128 with 4096 samples.
        methods: names of methods; all, if there are none.
        largest: leave out layers with more than this many entries in X, W or Y.
        steps: number of steps of Cardinality; the peak memory does not depend on it.
    """

    out: Path = Path("runs") / "benchmarks"
    sections: tuple[str, ...] = tuple(SIZES)
    methods: tuple[str, ...] = ()
    largest: int = 2**29
    steps: int = Cardinality().max_steps


@dataclass(frozen=True)
class Row:
    """One layer solved by one method.

    Attributes:
        section: what varies.
        method: name of the method.
        inputs: N.
        outputs: M.
        samples: P.
        seconds: of the solve and the refit.
        peak: of the memory, with the data of the layer, in GiB.
    """

    section: str
    method: str
    inputs: int
    outputs: int
    samples: int
    seconds: float
    peak: float

    def __str__(self) -> str:
        """One line of the log."""
        sizes = f"{self.inputs:7d}  {self.outputs:7d}  {self.samples:7d}"
        return f"{self.section:8}  {self.method:20}  {sizes}  {self.seconds:9.2f}  {self.peak:10.3f}"


def rows(settings: Settings) -> Iterator[Row]:
    """One row for each layer and method, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    for section in settings.sections:
        for method in settings.methods or METHODS:
            for N, M, P in SIZES[section]:
                if max(N * M, P * N, P * M) <= settings.largest:
                    with ProcessPoolExecutor(1, context) as pool:
                        yield pool.submit(_row, section, method, N, M, P, settings.steps).result()


def _row(section: str, method: str, N: int, M: int, P: int, steps: int) -> Row:
    solver = METHODS[method]
    solver = replace(solver, max_steps=steps) if isinstance(solver, Cardinality) else solver
    _solve(solver, 16, 4, 64)  # loads the libraries before the measurement begins
    meter = MemoryMeter(torch.device("cpu"))
    seconds = _solve(solver, N, M, P)
    return Row(section, method, N, M, P, seconds, meter.read_peak() / GIB)


def _solve(solver: Solver, N: int, M: int, P: int) -> float:
    """Solve a random layer at 80 % zeros and refit its weights, as `trim` does; the seconds."""
    problem = replace(random_problem(P, N, M), epsilon=None, sparsity=0.8)
    clock = Clock()
    solution = solve(problem, solver)
    refit(problem, solution.W, cg_steps=10, rtol=3e-3, atol=1e-4)
    return clock.read()


def exponents(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Slopes of log cost over log size: of the least-squares line through all points, and between the last two."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, (y[-1] - y[-2]) / (x[-1] - x[-2])


def table(rows: Sequence[Row]) -> str:
    """The exponents of time and memory for each section and method."""
    lines = ["exponent of         method                time: all  last two    memory: all  last two"]
    for section in dict.fromkeys(row.section for row in rows):
        for method in dict.fromkeys(row.method for row in rows):
            own = [row for row in rows if (row.section, row.method) == (section, method)]
            if section != "large" and len(own) > 1:
                sizes = [getattr(row, section) for row in own]
                time, memory = (exponents(sizes, [getattr(row, key) for row in own]) for key in ("seconds", "peak"))
                numbers = f"{time[0]:9.2f}  {time[1]:8.2f}  {memory[0]:13.2f}  {memory[1]:8.2f}"
                lines.append(f"{section:18}  {method:20}  {numbers}")
    return "\n".join(lines)
