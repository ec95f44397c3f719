"""What a solver is, what it returns, and the one loop that drives the iterative ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.sums import norm


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

    @classmethod
    def uncertified(cls, W: Tensor, status: Tensor | None = None, steps: int = 0, state: Any = None) -> Solution:
        """The answer of a method without objective and certificate; CONVERGED if no status is given."""
        batch = W.shape[:-2]
        if status is None:
            status = torch.full(batch, int(Status.CONVERGED), device=W.device)
        unknown = W.new_full(batch, torch.nan)
        return cls(W, status, torch.full_like(status, steps), unknown, unknown, unknown, unknown, unknown, state)


@dataclass(frozen=True)
class Solver(ABC):
    """A method that turns a `LayerProblem` into a `Solution`: numbers only, so that YAML can write it.

    ``convex`` says that it solves the program with a radius, of which the trained weights must be feasible; the others
    take a sparsity. ``behind`` says that it is given the layer behind the BatchNorm that follows it, and what others
    add to it; the others see the layer's own weights and inputs.
    """

    convex: ClassVar[bool] = False
    behind: ClassVar[bool] = True

    @abstractmethod
    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Solve a valid problem; never prints, warns or raises for want of convergence: the status says it.

        ``warm`` is the ``state`` of a solution for the same X, by the same solver.
        """


class Certificate(NamedTuple):
    """What an iterative solver has to show at a check; each but ``W`` shaped like the batch."""

    W: Tensor
    objective: Tensor
    bound: Tensor
    violation: Tensor
    worth: Tensor  # of the violation, in the units of the objective


@dataclass(frozen=True)
class IterativeSolver(Solver):
    """A solver that steps until the violation of its sparse answer and its relative duality gap are small.

    Args:
        max_steps: steps at most.
        rtol: relative duality gap to reach.
        atol: violation to reach, as a fraction of ε.
        check_every: steps between two looks at the certificate.
    """

    convex: ClassVar[bool] = True

    max_steps: int = 4000
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
        """The first state of a flat batch, on its own or from a neighbouring problem's last state."""

    @abstractmethod
    def step(self, problem: LayerProblem, state: Any) -> Any:
        """One iteration, in the state's own buffers, without host synchronisation."""

    @abstractmethod
    def certify(self, problem: LayerProblem, state: Any) -> Certificate:
        """The answer that the state holds and its certificate."""

    @abstractmethod
    def adapt(self, problem: LayerProblem, state: Any, lag: Tensor | None) -> Any:
        """The state, free of accumulated rounding, with its penalties moved unless there is no lag to go by.

        ``lag``, ``(batch)``, is how far the primal side (the violation, its worth) is from its tolerance over how far
        the bound is from its own.
        """

    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Iterate until the certificate is good enough."""
        return iterate(problem, self, warm)


def iterate(problem: LayerProblem, solver: IterativeSolver, warm: Any = None, *, adaptive: bool = True) -> Solution:
    """The one loop: step, look at the certificate every ``check_every`` steps, let go of what is finished.

    The penalties move in the first half of ``max_steps`` only (never unless ``adaptive``): convergence is proved for
    fixed ones.

    A problem is CONVERGED when its violation and its gap are within tolerance, and what its violation can have bought,
    at the prices of the moment, within half of it: the optimum is then at most ``rtol`` below its objective and, to
    first order, above it. Any lower bound ever shown holds, so the best one counts. Until the first look at a
    certificate the answer is the trained weights. A program is called INFEASIBLE once its lower bound exceeds a
    thousand times the norms of the trained weights and of the current answer while the constraints are still
    violated: no feasible program comes near that.
    """
    shape = problem.batch
    whole = problem = problem.flat()
    state = solver.init(problem, warm)
    W, objective, violation = problem.W.clone(), problem.objective(problem.W), problem.violation(problem.W)
    bound, trained = solver.certify(problem, state).bound, objective.clone()
    status = torch.full_like(objective, Status.MAX_STEPS, dtype=torch.int64)
    steps = torch.full_like(status, solver.max_steps)
    left = torch.arange(len(status), device=status.device)
    finished: list[tuple[Tensor, Any]] = []
    state = solver.adapt(problem, state, None)
    for step in range(1, solver.max_steps + 1):
        state = solver.step(problem, state)
        if step % solver.check_every and step != solver.max_steps:
            continue
        now = solver.certify(problem, state)
        lost = ~torch.isfinite(now.objective + now.violation)
        best = torch.where(now.bound > bound[left], now.bound, bound[left])
        gap = problem.duality_gap(now.objective, best)
        bought = problem.duality_gap(now.objective + now.worth, now.objective)
        primal = torch.maximum(now.violation / solver.atol, 2 * bought / solver.rtol)
        solved = (primal <= 1) & (gap >= 0) & (gap <= solver.rtol) & ~lost
        beyond = best > 1e3 * torch.maximum(trained[left], now.objective)
        infeasible = beyond & (now.violation > solver.atol) & ~lost
        kept = left[~lost]
        for held, value in zip((W, objective, bound, violation), now._replace(bound=best)[:4], strict=True):
            held[kept] = value[~lost]
        for flag, name in ((solved, Status.CONVERGED), (infeasible, Status.INFEASIBLE), (lost, Status.NONFINITE)):
            status[left[flag]] = int(name)
        done = solved | infeasible | lost
        steps[left[done]] = step
        if bool(done.all()) or step == solver.max_steps:
            break
        lag = primal / (gap.clamp(min=0) / solver.rtol)
        if bool(done.any()):
            finished.append((left[done], _members(state, done)))
            left, lag, state, problem = left[~done], lag[~done], _members(state, ~done), problem.take(~done)
        moving = adaptive and step <= solver.max_steps // 2
        state = solver.adapt(problem, state, lag if moving else None)
    state = _together([*finished, (left, state)])
    gap, epsilon = whole.duality_gap(objective, bound), norm(whole.radius)[..., 0, 0]
    W = W.reshape(shape + W.shape[1:])
    status, steps, objective, bound, gap, violation, epsilon = (
        t.reshape(shape) for t in (status, steps, objective, bound, gap, violation, epsilon)
    )
    return Solution(W, status, steps, objective, bound, gap, violation, epsilon, state)


@contextmanager
def coarse_products(allowed: bool) -> Iterator[None]:
    """Float32 products in TF32, or in what the CPU has of that kind, within."""
    before = torch.get_float32_matmul_precision()
    if allowed:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        if allowed:
            torch.set_float32_matmul_precision(before)


def _members(state: Any, which: Tensor) -> Any:
    """The state of some members of a batch."""
    return type(state)(*(t[which] for t in state))


def _together(parts: list[tuple[Tensor, Any]]) -> Any:
    """One state of all members, in their order, from those of disjoint groups."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([index for index, _ in parts]).argsort()
    return type(parts[0][1])(*(torch.cat(tensors)[order] for tensors in zip(*(s for _, s in parts), strict=True)))


def solve(problem: LayerProblem, solver: Solver, warm: Any = None) -> Solution:
    """Check the problem once and solve it, without gradients.

    Args:
        problem: the layer's program.
        solver: the method.
        warm: ``state`` of the same solver's solution of another problem with the same X.

    Returns:
        The sparse weights with their certificate.

    Raises:
        ValueError: if the problem is malformed; never for want of convergence.
    """
    with torch.no_grad():
        problem = problem.validate()
        return solver.solve(problem) if warm is None else solver.solve(problem, warm)
