"""The NumPy solver by the authors of Net-Trim, from an unmodified local clone of github.com/DNNToolBox/Net-Trim."""

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


def _load_solver(clone: str | Path | None) -> tuple[Callable[..., np.ndarray], Callable[..., Any]]:
    """The authors' solver, and threadpoolctl's ``threadpool_limits``."""
    path = Path(clone or "") / FILE
    if clone is None or not path.is_file():
        raise Unavailable(f"no '{FILE}' in {clone}: clone github.com/DNNToolBox/Net-Trim and pass its folder")
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
    """One run from zero for each number of steps, in float64.

    A run may end before that number, by the solver's own stopping criterion.

    Args:
        problem: one problem with ``V`` and ``penalty`` unset, without batch dimensions.
        clone: folder of the clone.
        rho: penalty parameter of the solver, constant during a run.
        steps: maximum number of steps of each run.
        threads: number of BLAS threads of NumPy and SciPy; ``None`` is their default. Their two thread pools can slow
            each other down.

    Raises:
        Unavailable: if the clone or a package that it imports is missing.
    """
    net_trim_solver, threadpool_limits = _load_solver(clone)
    X, Y = (np.ascontiguousarray(t.double().numpy().T) for t in (problem.X, problem.Y))
    V = None if problem.Omega is None else np.zeros_like(Y)
    for count in steps:
        with redirect_stdout(io.StringIO()), threadpool_limits(threads, "blas"):
            clock = Clock()
            W = net_trim_solver(X, Y, V, float(problem.epsilon), rho, max_iteration=count)
            seconds = clock.read()
        yield Trial(torch.from_numpy(W), seconds, count)
