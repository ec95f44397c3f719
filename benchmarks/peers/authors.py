"""The authors' own NumPy solver, from a local clone of github.com/DNNToolBox/Net-Trim, unchanged."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.clock import Clock
from benchmarks.peers import Trial, Unavailable
from lightning_nettrim import LayerProblem

NAME = "authors"
FILE = Path("Main NetTrim Solvers") / "NetTrimSolver_np.py"


def _net_trim_solver(clone: str | Path | None) -> tuple[Callable[..., np.ndarray], Callable[..., Any]]:
    path = Path(clone or "") / FILE
    if clone is None or not path.is_file():
        raise Unavailable(f"no '{FILE}' in {clone}: clone github.com/DNNToolBox/Net-Trim and name its folder")
    spec = importlib.util.spec_from_file_location("net_trim_authors", path)
    module = importlib.util.module_from_spec(spec)
    try:
        from threadpoolctl import threadpool_limits

        spec.loader.exec_module(module)
    except ImportError as error:
        raise Unavailable(f"the authors' solver needs {error.name}: pip install {error.name}") from error
    return module.net_trim_solver, threadpool_limits


def solve(
    problem: LayerProblem, clone: str | Path | None, rho: float, steps: Iterable[int], threads: int | None = None
) -> Iterator[Trial]:
    """One run from zeros for each number of steps, in float64; it may stop itself earlier.

    Args:
        problem: one program with ``V`` and ``penalty`` unset, without batch dimensions.
        clone: folder of the clone.
        rho: the solver's penalty, fixed over a run.
        steps: numbers of steps at most.
        threads: of NumPy's and SciPy's BLAS, whose two pools may hinder each other; theirs to choose if not given.

    Raises:
        Unavailable: if the clone or what it imports is not there.
    """
    net_trim_solver, threadpool_limits = _net_trim_solver(clone)
    X, Y = (np.ascontiguousarray(t.double().numpy().T) for t in (problem.X, problem.Y))
    V = None if problem.Omega is None else np.zeros_like(Y)
    for count in steps:
        with redirect_stdout(io.StringIO()), threadpool_limits(threads, "blas"):
            clock = Clock()
            W = net_trim_solver(X, Y, V, float(problem.epsilon), rho, max_iteration=count)
            seconds = clock.read()
        yield Trial(torch.from_numpy(W), seconds, count)
