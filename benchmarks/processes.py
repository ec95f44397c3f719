"""Step time of the solvers for several numbers of processes that share the rows, one thread per process, over gloo."""

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

SHORT_STEPS, ADDITIONAL_STEPS = 20, 60
"""Steps of the shorter of two solves, and by how many steps the other one is longer."""


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        out: folder of the results.
        processes: numbers of processes.
        samples: rows of the problem in total (strong scaling) or per process (weak scaling).
        inputs: number of inputs of the layer.
        outputs: number of outputs of the layer.
    """

    out: Path = Path("runs") / "benchmarks"
    processes: tuple[int, ...] = (1, 2)
    samples: int = 10_000
    inputs: int = 785
    outputs: int = 300


@dataclass(frozen=True)
class Row:
    """The step time of one solver with one number of processes.

    Attributes:
        solver: name of the solver.
        scaling: "strong", with a fixed total number of rows, or "weak", with a fixed number of rows per process.
        rows: total number of rows.
        processes: number of processes.
        seconds: time of a step in process 0.
        reduction: seconds of summing one matrix of the size of the weights over the processes, once per step.
        ratio: ``seconds`` relative to those with the first number of processes.
    """

    solver: str
    scaling: str
    rows: int
    processes: int
    seconds: float
    reduction: float
    ratio: float

    def __str__(self) -> str:
        """One line of the table."""
        times = f"{1e3 * self.seconds:9.1f}  {1e3 * self.reduction:14.1f}  {self.ratio:5.2f}"
        return f"{self.solver:<11}  {self.scaling:<7}  {self.rows:7d}  {self.processes:9d}  {times}"


def rows(settings: Settings) -> Iterator[Row]:
    """Both solvers for each number of processes, with strong and weak scaling."""
    baseline: dict[tuple[str, str], float] = {}
    for count in settings.processes:
        for solver, scaling, total, seconds, reduction in _measure(settings, count):
            ratio = seconds / baseline.setdefault((solver, scaling), seconds)
            yield Row(solver, scaling, total, count, seconds, reduction, ratio)


def _measure(settings: Settings, count: int) -> list[tuple[str, str, int, float, float]]:
    """Start the processes and return the measurements of process 0."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        arguments = [(rank, count, folder, settings, results) for rank in range(count)]
        processes = [context.Process(target=_process, args=own) for own in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            codes = [process.exitcode for process in processes]
            raise RuntimeError(f"expected exit code 0 of {count} processes, got {codes}: see their output above")
        return results.get()


def _process(rank: int, count: int, folder: str, settings: Settings, results: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    processes = TorchProcessGroup.of(torch.nn.Linear(1, 1))
    weights = torch.zeros(1, settings.inputs, settings.outputs)
    reduction, measurements = median_seconds(lambda: processes.sum(weights)), []
    for scaling, total in (("strong", settings.samples), ("weak", count * settings.samples)):
        whole = random_problem(total, settings.inputs, settings.outputs)
        shard = {key: getattr(whole, key)[:, rank::count].contiguous() for key in ("X", "Y", "Omega")}
        problem = replace(whole, **shard, processes=processes)
        measurements.append(("ADMM", scaling, total, _admm_step(problem), reduction))
        at_sparsity = replace(problem, epsilon=None, sparsity=0.9)
        measurements.append(("Cardinality", scaling, total, _cardinality_step(at_sparsity), reduction))
    if rank == 0:
        results.put(measurements)
    distributed.destroy_process_group()


def _admm_step(problem: LayerProblem) -> float:
    """Median seconds of a step."""
    solver = ADMM()
    state = solver.adapt(problem, solver.init(problem), None)
    return median_seconds(lambda: solver.step(problem, state))


def _cardinality_step(problem: LayerProblem) -> float:
    """Seconds of a step, from the difference of two solves with different numbers of steps."""
    short, long = (Cardinality(max_steps=steps) for steps in (SHORT_STEPS, SHORT_STEPS + ADDITIONAL_STEPS))
    spectrum = short.solve(problem).state
    seconds = []
    for solver in (short, long):
        clock = Clock()
        solver.solve(problem, spectrum)
        seconds.append(clock.read())
    return (seconds[1] - seconds[0]) / ADDITIONAL_STEPS


def table(rows: Sequence[Row]) -> str:
    """One line for each row."""
    head = "solver       scaling     rows  processes  step (ms)  reduction (ms)  ratio"
    return "\n".join([head, *map(str, rows)])
