"""Pruning one layer: record its activations, solve for its weights, measure the result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.reference import norm_over_processes
from lightning_nettrim.calibration.replaced import synthetic_inputs
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.layers import Layer
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.layer_problem import layer_problem
from lightning_nettrim.pruning.results import LayerReport
from lightning_nettrim.pruning.session import CalibrationSession
from lightning_nettrim.pruning.solving import SolvedLayer, solve_layer
from lightning_nettrim.runtime.memory import GIB
from lightning_nettrim.runtime.offload import release_freed_memory
from lightning_nettrim.solvers import Solution, Status


@dataclass(frozen=True, eq=False)
class LayerOutcome:
    """The result of pruning one layer.

    Attributes:
        values: its parameters, and those of the BatchNorm that is solved with it, by name.
        report: its report; the end-to-end error is NaN until the whole network is pruned.
        trained_distance: ‖response − Y‖ on the inputs of the trained network, if the layer is part of a chain.
        chained: whether its input is the response of the layer before it, up to the first layer.
    """

    values: dict[str, Tensor]
    report: LayerReport
    trained_distance: float
    chained: bool


def prune_layer(
    session: CalibrationSession, name: str, budget: Budget, previous: str | None = None, chained: bool = False
) -> LayerOutcome:
    """Prune one layer on the activations of the model as it is now; the model is not changed.

    Args:
        session: the trained model with its calibration data; the model must be in evaluation mode.
        name: of the layer.
        budget: of the layer.
        previous: name of the layer that is pruned before it; ``None`` for the first.
        chained: whether it and all layers before it are plain matrices, each fed by the one before, so that an
            end-to-end bound is known.
    """
    start, meter = time.perf_counter(), session.run.meter
    if meter is not None:
        meter.read_peak()
    synthetic = bool(budget.synthetic_inputs)
    chained = chained and not synthetic
    source = previous if chained else None
    sources, is_fed = [] if source is None else [source], False
    with _synthetic_inputs(session, budget) as activations:
        outputs = [*sources, *([name] if synthetic else [])]
        recordings = activations.record(*sources, name, inputs=[name], outputs=outputs)
    session.reference.check_rows(name, recordings[name].rows if name in recordings else 0, session.processes)
    if source is not None:
        is_fed = session.activations.is_input_of(source, recordings.pop(source), recordings[name])
    trained_inputs = session.config.scheme == "parallel" or previous is None
    problem = layer_problem(session, name, recordings.pop(name), budget, trained_inputs)
    release_freed_memory()  # blocks freed by the recording do not fit the buffers of the solve
    solved = solve_layer(session, name, problem, budget, trained_inputs)
    trained_distance = 0.0
    if chained and previous is None:
        is_fed, trained_distance = True, _distance(problem, solved.W)
    elif is_fed and previous is not None:
        inputs = session.folded_layers[name].input_rows(session.reference[previous][0])
        trained_distance = _distance(replace(problem, X=inputs), solved.W)
    memory = None if meter is None else meter.read_peak() / GIB
    report = _report(session, name, problem, solved, time.perf_counter() - start)
    return LayerOutcome(solved.values, replace(report, memory=memory), trained_distance, is_fed)


@contextmanager
def _synthetic_inputs(session: CalibrationSession, budget: Budget) -> Iterator[Activations]:
    """A `with` that yields the activations of the session, with the synthetic inputs of a budget if it has some."""
    if not budget.synthetic_inputs:
        yield session.activations
        return
    calibration_set = session.activations.calibration_set.without_cache()
    with synthetic_inputs(session.plan.layers, budget.synthetic_inputs, session.config.seed):
        yield replace(session.activations, calibration_set=calibration_set)


def local_error(problem: LayerProblem, W: Tensor) -> float:
    """‖response(W) − Y‖/‖Y‖ of all groups of a layer together (divided by 1 where Y = 0)."""
    return _distance(problem, W) / (norm_over_processes(problem.Y, problem.processes) or 1.0)


def _distance(problem: LayerProblem, W: Tensor) -> float:
    return norm_over_processes(problem.response(W) - problem.Y, problem.processes)


def _report(
    session: CalibrationSession, name: str, problem: LayerProblem, solved: SolvedLayer, seconds: float
) -> LayerReport:
    """The report of a layer, except its end-to-end error and its memory."""
    layer, solution = session.plan.layers[name], solved.solution
    norm = norm_over_processes(problem.Y, problem.processes) or 1.0
    zeros = _count_zeros(layer, solved.values, session.config.penalize_bias)
    objective, bound = solution.objective.sum(), solution.bound.sum()
    gap = solution.gap[0] if len(solution.gap) == 1 else (objective - bound) / objective
    return LayerReport(
        name=layer.name,
        type=layer.kind,
        shape=tuple(layer.parameter.shape),
        sparsity=zeros / problem.num_prunable,
        zeros=zeros,
        local_error=local_error(problem, solved.W),
        end_to_end_error=float("nan"),
        objective=_finite(objective),
        bound=_finite(bound),
        duality_gap=_finite(gap),
        violation=_finite(solution.violation.amax()),
        epsilon=_finite(torch.linalg.vector_norm(solution.epsilon) / norm),
        pattern=problem.pattern.name,
        steps=int(solution.steps.amax()),
        seconds=seconds,
        status=_status(solution),
        fallback=solved.fallback,
    )


def _status(solution: Solution) -> str | None:
    """The worst status of the groups of a layer."""
    return None if solution.status is None else Status(int(solution.status.amax())).name


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None


def _count_zeros(layer: Layer, values: Mapping[str, Tensor], penalize_bias: bool) -> int:
    """Number of exact zeros among the prunable values of a layer, in its own dtype."""
    names = layer.parameter_names(penalize_bias)
    return sum(int((values[name].to(layer.parameter.dtype) == 0).sum()) for name in names)
