"""What a solver is, what it returns, and the one loop that drives the iterative ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_nettrim.problem import LayerProblem


class Status(IntEnum):
    """How a solve ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    INFEASIBLE = 2
    NONFINITE = 3


@dataclass(frozen=True, eq=False)
class Solution:
    """An answer and its certificate; every field but ``W`` and ``state`` is shaped like the problem's batch.

    Attributes:
        W: ``(*batch, N, M)`` sparse weights.
        status: ``Status`` values as int64.
        steps: number of steps taken.
        objective: Σ λ|W| of the convex program's answer; NaN for methods without one.
        bound: lower bound of the optimum from a dual feasible point; NaN for methods without one.
        gap: relative duality gap between both; NaN for methods without one.
        violation: of the constraints by the convex program's answer, relative to ε; NaN for methods without one.
        epsilon: radius of the program that was solved; NaN for methods without one.
        state: the solver's own state, a warm start for a neighbouring problem on the same X.
    """

    W: Tensor
    status: Tensor
    steps: Tensor
    objective: Tensor
    bound: Tensor
    gap: Tensor
    violation: Tensor
    epsilon: Tensor
    state: Any = None


@dataclass(frozen=True)
class Solver(ABC):
    """A method that turns a `LayerProblem` into a `Solution`: numbers only, so that YAML can write it."""

    @abstractmethod
    def solve(self, problem: LayerProblem) -> Solution:
        """Solve a valid problem; never prints, warns or raises for want of convergence: the status says it."""


class Certificate(NamedTuple):
    """What an iterative solver has to show at a check; each but ``W`` shaped like the batch."""

    W: Tensor
    objective: Tensor
    bound: Tensor
    gap: Tensor
    violation: Tensor


@dataclass(frozen=True)
class IterativeSolver(Solver):
    """A solver that steps until the violation of its sparse answer and its relative duality gap are small.

    Args:
        max_steps: steps at most.
        rtol: relative duality gap to reach.
        atol: violation to reach, as a fraction of ε.
        check_every: steps between two looks at the certificate.
    """

    max_steps: int = 2000
    rtol: float = 1e-3
    atol: float = 1e-3
    check_every: int = 25

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        for name in ("max_steps", "rtol", "atol", "check_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{type(self).__name__}.{name}: expected > 0, got {getattr(self, name)}")

    @abstractmethod
    def init(self, problem: LayerProblem, warm: Any = None) -> Any:
        """The first state, from the trained weights or from a neighbouring problem's last state."""

    @abstractmethod
    def step(self, problem: LayerProblem, state: Any) -> Any:
        """One iteration, without host synchronisation."""

    @abstractmethod
    def certify(self, problem: LayerProblem, state: Any) -> Certificate:
        """The answer that the state holds and its certificate."""

    @abstractmethod
    def adapt(self, problem: LayerProblem, previous: Any, state: Any, certificate: Certificate) -> Any:
        """The state with its penalties moved in the light of its last step and of its certificate."""

    def solve(self, problem: LayerProblem) -> Solution:
        """Iterate from the trained weights."""
        return iterate(problem, self)


def iterate(problem: LayerProblem, solver: IterativeSolver, warm: Any = None) -> Solution:
    """The one loop: step, look at the certificate every ``check_every`` steps, freeze what is finished.

    A program is called INFEASIBLE once its lower bound exceeds a thousand times the norms of the trained weights
    and of the current answer while the constraints are still violated: no feasible program comes near that.
    """
    state = solver.init(problem, warm)
    best = solver.certify(problem, state)
    trained = problem.objective(problem.W)
    status = torch.full(problem.batch, Status.MAX_STEPS, device=problem.X.device)
    steps = torch.full(problem.batch, solver.max_steps, device=problem.X.device)
    active = torch.ones_like(status, dtype=torch.bool)
    for step in range(1, solver.max_steps + 1):
        previous, state = state, solver.step(problem, state)
        if step % solver.check_every and step != solver.max_steps:
            continue
        now = solver.certify(problem, state)
        lost = ~torch.isfinite(now.objective + now.violation)
        solved = (now.violation <= solver.atol) & (now.gap >= 0) & (now.gap <= solver.rtol) & ~lost
        infeasible = (now.bound > 1e3 * torch.maximum(trained, now.objective)) & (now.violation > solver.atol) & ~lost
        keep = active & ~lost
        best = Certificate(*(torch.where(_over(keep, new), new, old) for new, old in zip(now, best, strict=True)))
        for flag, value in ((solved, Status.CONVERGED), (infeasible, Status.INFEASIBLE), (lost, Status.NONFINITE)):
            status = torch.where(active & flag, int(value), status)
            steps = torch.where(active & flag, step, steps)
        active = active & ~(solved | infeasible | lost)
        if not bool(active.any()):
            break
        if step <= solver.max_steps // 2:  # fixed penalties in the second half, for which convergence is proved
            state = solver.adapt(problem, previous, state, now)
    epsilon = torch.linalg.matrix_norm(problem.radius)
    return Solution(best.W, status, steps, *best[1:], epsilon, state)


def _over(flag: Tensor, like: Tensor) -> Tensor:
    """A flag per problem, shaped to be broadcast over ``like``."""
    return flag.reshape(flag.shape + (1,) * (like.dim() - flag.dim()))


def solve(problem: LayerProblem, solver: Solver) -> Solution:
    """Check the problem once and solve it, without gradients.

    Args:
        problem: the layer's program.
        solver: the method.

    Returns:
        The sparse weights with their certificate.

    Raises:
        ValueError: if the problem is malformed; never for want of convergence.
    """
    with torch.no_grad():
        return solver.solve(problem.validate())
