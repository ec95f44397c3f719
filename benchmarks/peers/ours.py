"""ADMM of this package, with its solution at every evaluation of the certificate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.clock import Clock
from benchmarks.peers import Trial, Unavailable
from benchmarks.scoring import cast
from lightning_nettrim import ADMM, LayerProblem, Solution
from lightning_nettrim import solve as _solve

NAME = "ours"


@dataclass(frozen=True)
class _RecordingADMM(ADMM):
    """ADMM that records a trial at every evaluation of the certificate, with the clock paused."""

    trials: list[Trial] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    def certify(self, problem: LayerProblem, state: Any) -> Any:
        certificate = super().certify(problem, state)
        with self.clock.paused() as seconds:
            steps = min(len(self.trials) * self.check_every, self.max_steps)
            self.trials.append(Trial(certificate.W[0].clone().cpu(), seconds, steps))
        return certificate


def warm_up(problem: LayerProblem, device: str, tf32: bool) -> LayerProblem:
    """Move the problem to the device and take one step there, so that loading of kernels is not timed.

    Raises:
        Unavailable: if the device is not available.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable("no CUDA device is available")
    problem = cast(problem, device=device)
    _solve(problem, ADMM(max_steps=1, tf32=tf32))
    return problem


def solve_timed(problem: LayerProblem, solver: ADMM, device: str = "cpu") -> tuple[Solution, float]:
    """The solution with its certificate, and the seconds of the solve; the transfer to the device is not timed."""
    problem, clock = warm_up(problem, device, solver.tf32), Clock(device)
    solution = _solve(problem, solver)
    return solution, clock.read()


def solve(
    problem: LayerProblem, device: str = "cpu", tf32: bool = False, max_steps: int = 2000, tolerance: float = 1e-3
) -> Iterator[Trial]:
    """The solutions of one run, every 25 steps.

    Args:
        problem: one problem, without batch dimensions.
        device: "cpu" or "cuda".
        tf32: allow faster float32 formats for the products of a step.
        max_steps: maximum number of steps.
        tolerance: relative duality gap and violation at which the run ends.

    Raises:
        Unavailable: if the device is not available.
    """
    problem = warm_up(problem, device, tf32)
    solver = _RecordingADMM(max_steps=max_steps, tf32=tf32, rtol=tolerance, atol=tolerance, clock=Clock(device))
    _solve(problem, solver)
    yield from solver.trials
