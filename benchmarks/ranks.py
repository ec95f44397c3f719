"""Steps of the solvers against the number of processes that share the rows, one thread each, over gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from benchmarks.clock import Clock
from benchmarks.steps import median_seconds, random_problem
from lightning_nettrim import ADMM, Cardinality, LayerProblem
from lightning_nettrim.runtime.distributed import TorchProcessGroup

STEPS = 60
"""By which the longer of two solves is longer."""


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Args:
        out: folder of the results.
        processes: in turn.
        samples: rows of the problem; once of all processes together, once of each.
        inputs: of the layer.
        outputs: of the layer.
    """

    out: Path = Path("runs") / "benchmarks"
    processes: tuple[int, ...] = (1, 2)
    samples: int = 10_000
    inputs: int = 785
    outputs: int = 300


@dataclass(frozen=True)
class Row:
    """One solver on so many processes.

    Attributes:
        solver: whose step.
        rows: of the problem, in all.
        processes: that share them.
        seconds: a step, the median of the first process's.
        exchange: that one sum of a matrix of the size of the weights over the processes takes, once in a step.
        ratio: of the seconds to those of the first number of processes at as many rows each, or in all.
        share: "in all" or "each": which number of rows stays.
    """

    solver: str
    rows: int
    processes: int
    seconds: float
    exchange: float
    ratio: float
    share: str

    def __str__(self) -> str:
        """One line."""
        times = f"{1e3 * self.seconds:7.1f} ms  {1e3 * self.exchange:8.1f} ms  {self.ratio:5.2f}"
        return f"{self.solver:<12}  {self.rows:6d} rows, {self.share:<6}  {self.processes:9d}  {times}"


def rows(settings: Settings) -> Iterator[Row]:
    """The solvers on so many processes, once with as many rows in all, once with as many in each."""
    first: dict[tuple[str, str], float] = {}
    for count in settings.processes:
        for solver, share, total, seconds, exchange in _together(settings, count):
            ratio = seconds / first.setdefault((solver, share), seconds)
            yield Row(solver, total, count, seconds, exchange, ratio, share)


def _together(settings: Settings, count: int) -> list[tuple[str, str, int, float, float]]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answers = context.SimpleQueue()
        arguments = [(rank, count, folder, settings, answers) for rank in range(count)]
        processes = [context.Process(target=_process, args=own) for own in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            codes = [process.exitcode for process in processes]
            raise RuntimeError(f"expected {count} processes to end well, got exit codes {codes}: see above")
        return answers.get()


def _process(rank: int, count: int, folder: str, settings: Settings, answers: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    processes = TorchProcessGroup.of(torch.nn.Linear(1, 1))
    weights = torch.zeros(1, settings.inputs, settings.outputs)
    exchange, found = median_seconds(lambda: processes.sum(weights)), []
    for share, total in (("in all", settings.samples), ("each", count * settings.samples)):
        whole = random_problem(total, settings.inputs, settings.outputs)
        own = {key: getattr(whole, key)[:, rank::count].contiguous() for key in ("X", "Y", "Omega")}
        problem = replace(whole, **own, processes=processes)
        found.append(("ADMM", share, total, _admm(problem), exchange))
        counted = replace(problem, epsilon=None, sparsity=0.9)
        found.append(("Cardinality", share, total, _cardinality(counted), exchange))
    if rank == 0:
        answers.put(found)
    distributed.destroy_process_group()


def _admm(problem: LayerProblem) -> float:
    solver = ADMM()
    state = solver.adapt(problem, solver.init(problem), None)
    return median_seconds(lambda: solver.step(problem, state))


def _cardinality(problem: LayerProblem) -> float:
    """From two solves, of which one takes more steps."""
    few, many = Cardinality(steps=20), Cardinality(steps=20 + STEPS)
    spectrum = few.solve(problem).state
    seconds = []
    for solver in (few, many):
        clock = Clock()
        solver.solve(problem, spectrum)
        seconds.append(clock.read())
    return (seconds[1] - seconds[0]) / STEPS


def table(rows: Sequence[Row]) -> str:
    """A line for each number of processes."""
    return "\n".join(["solver        rows                 processes     step   exchange  ratio", *map(str, rows)])
