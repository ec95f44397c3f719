"""The solve of one layer: solver, refit, and what is done if the solve fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_nettrim.calibration.reference import norm_over_processes
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.session import CalibrationSession
from lightning_nettrim.solvers import Magnitude, Solution, Solver, Status, refit, solve, sparsest_within
from lightning_nettrim.solvers.elimination import without_inputs


class SolvedLayer(NamedTuple):
    """The weights of a solved layer."""

    solution: Solution  # before the refit, in terms of the folded layer
    W: Tensor  # (groups, N or N + 1, M) folded weights after the refit
    values: dict[str, Tensor]  # parameters of the model, by name
    fallback: str = ""  # what was done instead of a failed solve, and why


def solve_layer(
    session: CalibrationSession, name: str, problem: LayerProblem, budget: Budget, trained_inputs: bool
) -> SolvedLayer:
    """Solve the problem of a layer by the session's solver; if that fails, use the fallback of the options.

    Args:
        session: the trained model with its calibration data.
        name: of the layer.
        problem: of the layer.
        budget: of the layer.
        trained_inputs: whether the inputs are those of the trained network.
    """
    dense = SolvedLayer(Solution.uncertified(problem.W), problem.W, session.dense_values(name))
    if budget.sparsity == 0:
        return dense
    solver, folded = session.config.solver_for(budget.epsilon), session.folded_layers[name]
    status: Tensor | None = None
    try:
        solution = _solve(session, name, problem, solver, budget, trained_inputs)
        status, reason = solution.status, solve_failure(problem, solution)
        if not reason:
            solved = refit_layer(folded, problem, solution, solver, budget)
            reason = response_failure(problem, solved)
            if not reason:
                return solved
    except torch.linalg.LinAlgError as error:
        reason = f"the solve failed: {error}"
    if session.config.on_failure == "magnitude":
        solution = _solve(session, name, problem, Magnitude(), budget, trained_inputs)
        solved = refit_layer(folded, problem, solution, Magnitude(), budget)
        if not response_failure(problem, solved):
            return solved._replace(
                solution=replace(solved.solution, status=status),
                fallback=f"pruned by magnitude and refitted, because {reason}",
            )
    return dense._replace(solution=replace(dense.solution, status=status), fallback=f"left dense, because {reason}")


def _solve(
    session: CalibrationSession, name: str, problem: LayerProblem, solver: Solver, budget: Budget, trained_inputs: bool
) -> Solution:
    """The solution of a solver, by its capabilities; of the folded layer, or else of the layer's own weights."""
    if budget.removed_inputs:
        removed = torch.tensor(budget.removed_inputs, device=problem.W.device)
        if budget.input_scales:
            W = problem.W.clone()
            W[:, : len(budget.input_scales)] *= W.new_tensor(budget.input_scales).unsqueeze(-1)
            return Solution.uncertified(W.index_fill(1, removed, 0))
        return Solution.uncertified(without_inputs(problem, removed))
    if budget.epsilon is not None and not solver.takes_epsilon:
        return sparsest_within(problem, solver, budget.refit)
    if not solver.uses_folded_layer and budget.epsilon is None:
        return solve(_unfolded(session, name, problem), solver)
    importance = session.importance.get(name)
    if not (trained_inputs and solver.state_depends_on_inputs_only):
        return solve_weighted(problem, solver, importance)
    solution = solve_weighted(problem, solver, importance, session.solver_states.get(name, problem.W.device))
    session.solver_states.put(name, solution.state)
    return solution


def solve_weighted(problem: LayerProblem, solver: Solver, factor: Tensor | None, warm: Any = None) -> Solution:
    """Solve with the error of each neuron weighted by its importance; ReLU commutes with positive factors.

    Args:
        problem: the problem of one layer, or of several.
        solver: the solver.
        factor: ``(batch, 1, M)`` importance; ``None`` is the same for all neurons.
        warm: a state of the solver.
    """
    bounded = problem.Omega is not None and (problem.rectifier.low != 0 or problem.has_upper_bound)
    if factor is None or bounded or not solver.minimizes_distance:
        return solve(problem, solver, warm)
    offset = None if problem.offset is None else problem.offset * factor
    weighted = replace(problem, Y=problem.Y * factor, W=problem.W * factor, offset=offset)
    solution = solve(weighted, solver, warm)
    return replace(solution, W=solution.W / factor)


def refit_layer(
    folded: FoldedLayer, problem: LayerProblem, solution: Solution, solver: Solver, budget: Budget
) -> SolvedLayer:
    """The solution after a refit to the reference responses, if the budget asks for one."""
    unfolded = not solver.uses_folded_layer and budget.epsilon is None
    own = folded.layer.to_parameters(solution.W) if unfolded else {}
    if unfolded:
        solution = replace(solution, W=folded.fold_weights(solution.W))
    if not budget.refit:
        return SolvedLayer(solution, solution.W, own or folded.to_parameters(solution.W))
    effort: dict[str, Any] = {} if solver.takes_epsilon else {"cg_steps": 10, "rtol": 3e-3, "atol": 1e-4}
    W = refit(replace(problem, V=None), solution.W, **effort)
    return SolvedLayer(solution, W, folded.to_parameters(W))


def _unfolded(session: CalibrationSession, name: str, problem: LayerProblem) -> LayerProblem:
    """The same problem in the layer's own weights, before the BatchNorm."""
    folded = session.folded_layers[name]
    free = folded.layer.bias is not None and not session.config.penalize_bias
    W = folded.W
    X = problem.X[..., : W.shape[1]]
    return replace(problem, X=X, W=W, penalty=folded.layer.penalty(X) if free else None)


def solve_failure(problem: LayerProblem, solution: Solution) -> str:
    """Why a solution cannot be used; empty if it can."""
    if solution.status is not None:
        status = Status(int(solution.status.amax()))
        if status in (Status.NONFINITE, Status.INFEASIBLE):
            return f"the solve ended with status {status.name}"
    return "" if bool(solution.W.isfinite().all()) else "the solution has NaN or Inf"


def response_failure(problem: LayerProblem, solved: SolvedLayer) -> str:
    """Why the weights after the refit cannot be used; empty if they can.

    A solve that has not converged can be used if the distance of the response is within its radius.
    """
    if not bool(solved.W.isfinite().all()):
        return "the weights after the refit have NaN or Inf"
    solution = solved.solution
    unfinished = solution.status is not None and int(solution.status.amax()) == Status.MAX_STEPS
    if unfinished and bool(solution.epsilon.isfinite().all()):
        distance, radius = norm_over_processes(problem.distance(solved.W)), norm_over_processes(solution.epsilon)
        if distance > 1.01 * radius:
            return (
                f"the solve did not converge: the distance of the response is {distance / radius:.2f} times its radius"
            )
    return ""
