"""What each process of the tests of process groups does; a part is "group" or "solvers"."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from processes import run_processes
from torch import distributed, nn

from lightning_nettrim import Cardinality, LayerProblem, refit, solve_path
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup

ROWS = torch.arange(10.0, dtype=torch.float64).reshape(5, 2)
"""Rows of which the first process has 3 and the second 2."""


def linear_problem(processes: ProcessGroup = SINGLE_PROCESS) -> LayerProblem:
    """A linear layer with an offset, whose rows of each of two processes are fewer than its inputs."""
    generator = torch.Generator().manual_seed(2)
    rows = slice(processes.rank, None, processes.count)
    X, R = (torch.randn(31, n, generator=generator, dtype=torch.float64)[rows] for n in (20, 6))
    W = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    epsilon = torch.tensor(2.0, dtype=torch.float64)
    return LayerProblem(X, X @ W + R, W, epsilon=epsilon, sparsity=0.5, offset=R, processes=processes)


def solutions(processes: ProcessGroup = SINGLE_PROCESS) -> dict[str, torch.Tensor]:
    """``{method: weights}`` of the linear problem."""
    problem = linear_problem(processes)
    return {
        "path": torch.stack([solution.W for solution in solve_path(problem, [4.0, 2.0])]),
        "refit": refit(problem, problem.W * (problem.W.abs() > 0.5)),
        "cardinality": Cardinality().solve(problem).W,
    }


def message(call: Callable[[], object]) -> str:
    """Type and text of the error that a call raises; empty if it raises none."""
    try:
        call()
    except (ValueError, RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def group_results(processes: ProcessGroup) -> dict[str, Any]:
    """What every method of a process group returns in this process."""
    rank = processes.rank
    own = ROWS[3 * rank : 3 + 2 * rank]
    sent = [torch.full((2,), float(rank)), torch.full((3,), rank, dtype=torch.int64)]
    processes.broadcast(sent)

    def fail(*errors: Exception | None) -> str:
        def call() -> None:
            with processes.raise_together():
                if (error := errors[rank]) is not None:
                    raise error

        return message(call)

    same = {"fc.weight": torch.ones(2, 3)}
    return {
        "sum": processes.sum(own.sum(0)),
        "norm": processes.norm(torch.linalg.vector_norm(own, dim=0)),
        "gather_rows": processes.gather_rows(own),
        "gather": processes.gather(("rank", rank)),
        "any": [processes.any(rank == 1), processes.any(False)],
        "all": [processes.all(rank == 1), processes.all(True)],
        "mean": processes.mean(rank + 1.0),
        "broadcast": sent,
        "no error": fail(None, None),
        "one error": fail(None, ValueError("broken")),
        "two errors": fail(RuntimeError("first"), ValueError("second")),
        "out of memory": fail(None, MemoryError("full")),
        "one out of memory": fail(ValueError("broken"), MemoryError("full")),
        "identical": message(lambda: processes.check_identical(same)),
        "not identical": message(lambda: processes.check_identical({"fc.weight": torch.ones(2, 3) + 1e-7 * rank})),
    }


def run_two_processes(folder: Path, part: str) -> list[Any]:
    """The results of a part in two processes."""
    for finished in run_processes(main, [(folder, rank, 2, part) for rank in range(2)], folder):
        assert finished.returncode == 0, finished.printed
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def main(folder: Path, rank: int, count: int, part: str) -> None:
    """Run a part and write its results to the folder."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    processes = TorchProcessGroup.of(nn.Linear(1, 1))
    results = {"group": group_results, "solvers": solutions}[part](processes)
    if part == "group":
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
        results["wrapped"] = message(lambda: TorchProcessGroup.of(wrapped))
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()
