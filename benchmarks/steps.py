"""What one step costs, beside the two products with X that it cannot do without."""

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


@dataclass(frozen=True)
class StepCost:
    """Median seconds, and the rate at which a step does the 4PNM operations of its two products."""

    step: float
    products: float
    gflops: float

    @property
    def ratio(self) -> float:
        """Step over products."""
        return self.step / self.products


def random_problem(P: int, N: int, M: int, device: str = "cpu") -> LayerProblem:
    """A random ReLU layer's program in float32 at ε = 0.1 ‖Y‖_F, a batch of one."""
    generator = torch.Generator().manual_seed(0)
    X, W = (torch.randn(1, *shape, generator=generator).to(device) for shape in ((P, N), (N, M)))
    W /= N**0.5
    Y = (X @ W).relu()
    return LayerProblem(X, Y, W, epsilon=0.1 * torch.linalg.matrix_norm(Y), Omega=Y > 0)


def step_cost(P: int, N: int, M: int, device: str = "cpu", tf32: bool = False) -> StepCost:
    """Time a step of ADMM and its products, ``R += X move`` and ``XᵀE``, on a random layer.

    Args:
        P: samples.
        N: inputs.
        M: outputs.
        device: "cpu" or "cuda".
        tf32: both in faster formats than float32.

    Raises:
        Unavailable: if there is no such device.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable("no CUDA device here")
    problem, solver = random_problem(P, N, M, device), ADMM(tf32=tf32)
    state = solver.adapt(problem, solver.init(problem), None)
    X, R, move, g = problem.X, problem.Y.clone(), problem.W.clone() / P, torch.zeros_like(problem.W)

    def products() -> None:
        R.baddbmm_(X, move)
        torch.bmm(X.mT, R, out=g)

    step = median_seconds(lambda: solver.step(problem, state), device)
    with _formats("medium" if tf32 else "highest"):
        floor = median_seconds(products, device)
    return StepCost(step, floor, 4e-9 * P * N * M / step)


def median_seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Of some rounds, after one that is not counted."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        clock = Clock(device)
        work()
        seconds.append(clock.read())
    return median(seconds)


@contextmanager
def _formats(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
