"""What a solver is, what it returns, and the one loop that drives the iterative ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_nettrim.core.certificate import duality_gap, violation
from lightning_nettrim.core.precision import matmul_precision
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.reductions import norm
from lightning_nettrim.core.validation import validate


class Status(IntEnum):
    """How a solve ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    INFEASIBLE = 2
    NONFINITE = 3


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of a solver; every field except ``W`` and ``state`` has the shape of the problem's batch.

    The fields of the certificate are NaN, and the status is ``None``, for methods that give no certificate.

    Attributes:
        W: ``(*batch, N, M)`` sparse weights; NaN or Inf where the method has failed.
        status: `Status` values as int64; ``None`` for methods without a certificate.
        steps: number of steps taken.
        objective: Σ λ|W| of the solution of the convex program.
        bound: lower bound of the optimum, from a dual feasible point.
        gap: relative duality gap between objective and bound.
        violation: of the constraints of the convex program, relative to ε.
        epsilon: radius of the program that was solved.
        state: the solver's own state, a warm start for other budgets on the same inputs.
    """

    W: Tensor
    status: Tensor | None
    steps: Tensor
    objective: Tensor
    bound: Tensor
    gap: Tensor
    violation: Tensor
    epsilon: Tensor
    state: Any = None

    @classmethod
    def uncertified(cls, W: Tensor, steps: int = 0, state: Any = None) -> Solution:
        """The result of a method without objective and certificate."""
        unknown = W.new_full(W.shape[:-2], torch.nan)
        taken = torch.full(W.shape[:-2], steps, device=W.device)
        return cls(W, None, taken, unknown, unknown, unknown, unknown, unknown, state)


@dataclass(frozen=True)
class Solver(ABC):
    """A method that turns a `LayerProblem` into a `Solution`: a frozen dataclass of numbers that YAML can define.

    Class attributes declare its capabilities; callers read these and never the type.

    Attributes:
        takes_epsilon: it solves problems with an ``epsilon``, of which the trained weights must be feasible. Every
            solver solves problems with a ``sparsity``.
        certifies: its solutions have a status, a lower bound and a duality gap.
        uses_folded_layer: it is given the weights with the BatchNorm that follows folded into them, and the residual
            that is added. Otherwise it is given the layer's own weights and inputs.
        state_depends_on_inputs_only: the state of a solution depends on X alone, so that it can be reused for any other
            budget or responses on the same inputs.
        minimizes_distance: it minimizes the distance to the responses, so that weighting the outputs has an effect.
    """

    takes_epsilon: ClassVar[bool] = False
    certifies: ClassVar[bool] = False
    uses_folded_layer: ClassVar[bool] = True
    state_depends_on_inputs_only: ClassVar[bool] = False
    minimizes_distance: ClassVar[bool] = False

    @abstractmethod
    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Solve a validated problem.

        A solver does not print, warn or raise if it does not converge; status and weights tell.

        Args:
            problem: with a ``sparsity`` or, if the solver takes one, an ``epsilon``.
            warm: ``state`` of a solution by the same solver for the same X.
        """


class Certificate(NamedTuple):
    """The current solution of an iterative solver with its bounds; each except ``W`` has the shape of the batch."""

    W: Tensor
    objective: Tensor
    bound: Tensor
    violation: Tensor
    price: Tensor  # of the violation, in the units of the objective


@dataclass(frozen=True)
class IterativeSolver(Solver):
    """A solver that iterates until the violation of its sparse solution and its relative duality gap are small.

    Args:
        max_steps: maximum number of steps.
        rtol: relative duality gap to reach.
        atol: violation to reach, as a fraction of ε.
        check_every: number of steps between two evaluations of the certificate.
    """

    takes_epsilon: ClassVar[bool] = True
    certifies: ClassVar[bool] = True

    max_steps: int = 4000
    rtol: float = 1e-3
    atol: float = 1e-3
    check_every: int = 25

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("max_steps", "rtol", "atol", "check_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{type(self).__name__}.{name}: expected > 0, got {getattr(self, name)}")

    @abstractmethod
    def init(self, problem: LayerProblem, warm: Any = None) -> Any:
        """The initial state of a flat batch, or a warm start from the last state of a similar problem."""

    @abstractmethod
    def step(self, problem: LayerProblem, state: Any) -> Any:
        """One iteration, in the state's own buffers, without host synchronization."""

    @abstractmethod
    def certify(self, problem: LayerProblem, state: Any) -> Certificate:
        """The solution that the state holds and its certificate."""

    @abstractmethod
    def adapt(self, problem: LayerProblem, state: Any, lag: Tensor | None) -> Any:
        """The state without accumulated rounding errors, with adapted penalty parameters if a lag is given.

        ``lag``, ``(batch)``, is the ratio of how far the primal side (the violation and its price) and the dual side
        (the bound) are from their tolerances.
        """

    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Iterate until the certificate is within tolerance."""
        return iterate(problem, self, warm)


def iterate(problem: LayerProblem, solver: IterativeSolver, warm: Any = None, *, adaptive: bool = True) -> Solution:
    """Run the steps of a solver, evaluate the certificate every ``check_every`` steps, drop finished problems.

    The penalty parameters are adapted in the first half of ``max_steps`` only (never unless ``adaptive``):
    convergence is proved for fixed ones.

    A problem is CONVERGED when its violation and its gap are within tolerance and the price of its violation is within
    half of the tolerance of the gap: the optimum is then at most ``rtol`` below its objective and, to first order, at
    most ``rtol`` above it. The best lower bound of all evaluations is kept. Before the first evaluation the solution
    is the trained weights. A program is INFEASIBLE if its lower bound exceeds a thousand times the norms of the
    trained weights and of the current solution while the constraints are still violated.
    """
    shape = problem.batch
    whole = problem = problem.flattened()
    state = solver.init(problem, warm)
    W, objective, excess = problem.W.clone(), problem.objective(problem.W), violation(problem, problem.W)
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
        gap = duality_gap(problem, now.objective, best)
        price = duality_gap(problem, now.objective + now.price, now.objective)
        primal = torch.maximum(now.violation / solver.atol, 2 * price / solver.rtol)
        solved = (primal <= 1) & (gap >= 0) & (gap <= solver.rtol) & ~lost
        beyond = best > 1e3 * torch.maximum(trained[left], now.objective)
        infeasible = beyond & (now.violation > solver.atol) & ~lost
        for best_known, value in zip((W, objective, bound, excess), now._replace(bound=best)[:4], strict=True):
            keeps = lost.reshape(-1, *(1,) * (value.dim() - 1))
            best_known[left] = torch.where(keeps, best_known[left], value)
        for flag, name in ((solved, Status.CONVERGED), (infeasible, Status.INFEASIBLE), (lost, Status.NONFINITE)):
            status[left] = torch.where(flag, int(name), status[left])
        done = solved | infeasible | lost
        steps[left] = torch.where(done, step, steps[left])
        over = done.cpu().tolist()  # the host waits for the device here only
        if all(over) or step == solver.max_steps:
            break
        lag = primal / (gap.clamp(min=0) / solver.rtol)
        if any(over):
            ended, running = _indices(over, left), _indices([not ended for ended in over], left)
            finished.append((left[ended], _subset(state, ended)))
            left, lag, state, problem = left[running], lag[running], _subset(state, running), problem.subset(running)
        moving = adaptive and step <= solver.max_steps // 2
        state = solver.adapt(problem, state, lag if moving else None)
    state = _merged([*finished, (left, state)])
    gap, epsilon = duality_gap(whole, objective, bound), norm(whole.radius)[..., 0, 0]
    W = W.reshape(shape + W.shape[1:])
    status, steps, objective, bound, gap, excess, epsilon = (
        t.reshape(shape) for t in (status, steps, objective, bound, gap, excess, epsilon)
    )
    return Solution(W, status, steps, objective, bound, gap, excess, epsilon, state)


@contextmanager
def coarse_products(allowed: bool) -> Iterator[None]:
    """A `with` in which float32 matrix products may use TF32 or, on the CPU, torch's "medium" precision."""
    with matmul_precision("medium") if allowed else nullcontext():
        yield


def _indices(flags: list[bool], like: Tensor) -> Tensor:
    """The positions of the set flags, on the device of a tensor."""
    return torch.tensor([i for i, flag in enumerate(flags) if flag], dtype=like.dtype).to(like.device)


def _subset(state: Any, which: Tensor) -> Any:
    """The state of the problems at the given indices of the batch."""
    return type(state)(*(t[which] for t in state))


def _merged(parts: list[tuple[Tensor, Any]]) -> Any:
    """The state of the whole batch, in order, from those of disjoint subsets."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([index for index, _ in parts]).argsort()
    return type(parts[0][1])(*(torch.cat(tensors)[order] for tensors in zip(*(s for _, s in parts), strict=True)))


def solve(problem: LayerProblem, solver: Solver, warm: Any = None) -> Solution:
    """Validate a problem and solve it, without gradients and in full float32 precision.

    Args:
        problem: the problem of a layer.
        solver: the method.
        warm: ``state`` of a solution by the same solver of another problem with the same X.

    Returns:
        The sparse weights with their certificate.

    Raises:
        ValueError: if the problem is malformed. A solve that does not converge raises nothing.
    """
    with torch.no_grad(), matmul_precision("highest"):
        problem = validate(problem)
        return solver.solve(problem) if warm is None else solver.solve(problem, warm)
