"""This package's ADMM, with the answer that it holds at every look at its certificate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.clock import Clock
from benchmarks.objective import cast
from benchmarks.peers import Trial, Unavailable
from lightning_nettrim import ADMM, LayerProblem, Solution
from lightning_nettrim import solve as _solve

NAME = "ours"


@dataclass(frozen=True)
class _Traced(ADMM):
    trials: list[Trial] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    def certify(self, problem: LayerProblem, state: Any) -> Any:
        certificate = super().certify(problem, state)
        with self.clock.stopped() as seconds:
            steps = min(len(self.trials) * self.check_every, self.max_steps)
            self.trials.append(Trial(certificate.W[0].clone().cpu(), seconds, steps))
        return certificate


def placed(problem: LayerProblem, device: str, tf32: bool) -> LayerProblem:
    """The problem on the device, one step done there so that no clock counts the loading of kernels.

    Raises:
        Unavailable: if there is no such device.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable("no CUDA device here")
    problem = cast(problem, device=device)
    _solve(problem, ADMM(max_steps=1, tf32=tf32))
    return problem


def timed(problem: LayerProblem, solver: ADMM, device: str = "cpu") -> tuple[Solution, float]:
    """The solution with its certificate, and seconds from the problem on the device to there."""
    problem, clock = placed(problem, device, solver.tf32), Clock(device)
    solution = _solve(problem, solver)
    return solution, clock.read()


def solve(
    problem: LayerProblem, device: str = "cpu", tf32: bool = False, max_steps: int = 2000, tolerance: float = 1e-3
) -> Iterator[Trial]:
    """The answers of one run, every 25 steps from the trained weights to the certificate.

    Args:
        problem: one program, without batch dimensions.
        device: "cpu" or "cuda".
        tf32: let the products of a step be in faster formats.
        max_steps: steps at most.
        tolerance: relative duality gap and violation at which the run ends.

    Raises:
        Unavailable: if there is no such device.
    """
    problem = placed(problem, device, tf32)
    solver = _Traced(max_steps=max_steps, tf32=tf32, rtol=tolerance, atol=tolerance, clock=Clock(device))
    _solve(problem, solver)
    yield from solver.trials
