"""The time of one step of ADMM, and of the two products with X that it contains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.clock import Clock
from benchmarks.peers import Unavailable
from lightning_nettrim import ADMM, LayerProblem

ROUNDS = 20
"""Number of runs of which `median_seconds` takes the median."""


@dataclass(frozen=True)
class StepCost:
    """The cost of one step.

    Attributes:
        step: median seconds of a step.
        products: median seconds of its two products with X.
        gflops: rate, in GFLOP/s, of the 4PNM operations of the two products over the time of a step.
    """

    step: float
    products: float
    gflops: float

    @property
    def ratio(self) -> float:
        """Step time over products time."""
        return self.step / self.products


def random_problem(P: int, N: int, M: int, device: str = "cpu") -> LayerProblem:
    """The problem of a random ReLU layer in float32 at ε = 0.1 ‖Y‖_F, a batch of one."""
    generator = torch.Generator().manual_seed(0)
    X, W = (torch.randn(1, *shape, generator=generator).to(device) for shape in ((P, N), (N, M)))
    W /= N**0.5
    Y = (X @ W).relu()
    return LayerProblem(X, Y, W, epsilon=0.1 * torch.linalg.matrix_norm(Y), Omega=Y > 0)


def step_cost(P: int, N: int, M: int, device: str = "cpu", tf32: bool = False) -> StepCost:
    """Time a step of ADMM and its products, ``R += X increment`` and ``XᵀE``, on a random layer.

    Args:
        P: number of samples.
        N: number of inputs.
        M: number of outputs.
        device: "cpu" or "cuda".
        tf32: allow faster float32 formats for both.

    Raises:
        Unavailable: if the device is not available.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable("no CUDA device is available")
    problem, solver = random_problem(P, N, M, device), ADMM(tf32=tf32)
    state = solver.adapt(problem, solver.init(problem), None)
    X, R, increment, g = problem.X, problem.Y.clone(), problem.W.clone() / P, torch.zeros_like(problem.W)

    def products() -> None:
        R.baddbmm_(X, increment)
        torch.bmm(X.mT, R, out=g)

    step = median_seconds(lambda: solver.step(problem, state), device)
    with _matmul_precision("medium" if tf32 else "highest"):
        product_seconds = median_seconds(products, device)
    return StepCost(step, product_seconds, 4e-9 * P * N * M / step)


def median_seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Median run time over `ROUNDS` runs, after one warm-up run."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        clock = Clock(device)
        work()
        seconds.append(clock.read())
    return median(seconds)


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """A `with` in which float32 matrix products use the given precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
