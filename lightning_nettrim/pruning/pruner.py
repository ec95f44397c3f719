"""Pruning all layers of a model to given budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from lightning_nettrim.calibration import batchnorm
from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.core.activation import Rectifier
from lightning_nettrim.layers import Layer, masking
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.layer import LayerOutcome
from lightning_nettrim.pruning.recovery import Recovery
from lightning_nettrim.pruning.results import LayerReport, PruningResult
from lightning_nettrim.pruning.session import CalibrationSession, retried, with_fewer_rows
from lightning_nettrim.pruning.steps import Step, with_memory_retries, with_progress, with_reports, with_resume
from lightning_nettrim.runtime.sharded import full, reshard

Budgets = Mapping[str, Budget]


def prune_network(
    session: CalibrationSession,
    budgets: Budgets,
    on_layer: Callable[[LayerReport], None] | None = None,
    label: str = "",
) -> tuple[PruningResult, CalibrationSession]:
    """Prune the trained model to budgets, in place; call it within `CalibrationSession.restored_on_error`.

    Args:
        session: the trained model with its calibration data.
        budgets: of every layer.
        on_layer: called with the report of each finished layer; its end-to-end error is NaN then.
        label: prefix of the names of stored outcomes.

    Returns:
        The result, and the session, with fewer rows if memory has run out.
    """
    start = time.perf_counter()
    step = with_reports(with_progress(with_resume(with_memory_retries, label)), on_layer)
    with evaluation_mode(session.model):
        session.restore()
        outcomes, session = prune_layers(session, budgets, step)
        session.run.progress.activity = "measuring the pruned network"
        finish_batchnorms(session, budgets, outcomes)
        result, session = measure_errors(session, _result(session, outcomes))
        if session.config.recover is not None:
            result, session = recover_network(session, session.config.recover, result)
    return replace(result, seconds=time.perf_counter() - start), session


def prune_layers(
    session: CalibrationSession, budgets: Budgets, step: Step, previous: str | None = None
) -> tuple[dict[str, LayerOutcome], CalibrationSession]:
    """The loop over the layers, in order of execution.

    Args:
        session: the trained model with its calibration data.
        budgets: of every layer.
        step: prunes one layer.
        previous: the layer that has been pruned before the first one; ``None`` if there is none.
    """
    outcomes: dict[str, LayerOutcome] = {}
    chained = previous is None
    for name in session.plan.layers:
        outcome, session = step(session, name, budgets[name], previous, chained and _is_chainable(session, name))
        if session.config.scheme == "cascade":
            masking.assign(session.model, outcome.values)
            reestimate_after(session, name, budgets)
        outcome = replace(outcome, values=masking.divided(session.model, outcome.values))
        outcomes[name], previous, chained = outcome, name, outcome.chained
    return outcomes, session


def finish_batchnorms(session: CalibrationSession, budgets: Budgets, outcomes: Mapping[str, LayerOutcome]) -> None:
    """Re-estimate the BatchNorms that the loop has not; in the parallel scheme, assign all weights first."""
    if session.config.scheme == "parallel":
        for outcome in outcomes.values():
            masking.assign(session.model, outcome.values)
        for name in session.plan.layers:
            reestimate_after(session, name, budgets)
    names = [name for name in session.batchnorms if _is_solved_with_layer(session, name, budgets)]
    calibration_set = session.activations.calibration_set
    values = batchnorm.reestimate_preserving_output(session.model, names, calibration_set, session.processes)
    masking.assign(session.model, values)


def reestimate_after(session: CalibrationSession, layer: str, budgets: Budgets) -> None:
    """Re-estimate, one by one, the BatchNorms that follow a layer and were not folded into a solved one."""
    for name in session.batchnorms:
        if session.plan.batchnorms[name] == layer and not _is_solved_with_layer(session, name, budgets):
            calibration_set = session.activations.calibration_set
            values = batchnorm.reestimate(session.model, name, calibration_set, session.processes)
            masking.assign(session.model, values)


def measure_errors(session: CalibrationSession, result: PruningResult) -> tuple[PruningResult, CalibrationSession]:
    """The result with the end-to-end errors of the model as it is; it must be in evaluation mode."""
    distances, session = retried(session, lambda s: s.reference.distances(s.activations), with_fewer_rows)
    norms = {name: norm or 1.0 for name, norm in session.reference.norms.items()}
    errors = {name: distances[name] / norms[name] for name in distances}
    reports = tuple(replace(report, end_to_end_error=errors[report.name]) for report in result.reports)
    return replace(
        result,
        reports=reports,
        end_to_end_error=errors[session.last],
        output_distance=distances[session.last],
        output_norm=session.reference.norms[session.last],
        notes=tuple(session.run.notes),
    ), session


def recover_network(
    session: CalibrationSession, recovery: Recovery, result: PruningResult
) -> tuple[PruningResult, CalibrationSession]:
    """Recover a pruned model in place, and measure its errors again; there is no bound of them any more."""
    report = replace(recovery.recover(session, result.masks), end_to_end_error_before=result.end_to_end_error)
    if report.steps:
        result, session = measure_errors(session, replace(result, end_to_end_bound=None))
    return replace(result, recovery=report), session


def _is_solved_with_layer(session: CalibrationSession, name: str, budgets: Budgets) -> bool:
    """Whether a BatchNorm was folded into a solved layer, so that its output must not change."""
    return any(
        context.batchnorm == name
        and (session.config.solver_for(budgets[layer].epsilon).uses_folded_layer or budgets[layer].refit)
        for layer, context in session.plan.contexts.items()
    )


def _is_chainable(session: CalibrationSession, name: str) -> bool:
    """Whether a layer is a plain matrix, followed by a ReLU or nothing."""
    context, layer = session.plan.contexts[name], session.plan.layers[name]
    relu = context.rectifier is None or context.rectifier.equals(Rectifier())
    return layer.is_plain_matrix and context.batchnorm is None and not context.residual_sums and relu


def _result(session: CalibrationSession, outcomes: Mapping[str, LayerOutcome]) -> PruningResult:
    """The result for a pruned model, except errors and time."""
    reshard(session.model)
    parameters = dict(session.model.named_parameters())
    prunable = {name: parameters[name] for name in session.prunable_parameters}
    bound = _end_to_end_bound(session.plan.layers, outcomes)
    unknown = float("nan")
    return PruningResult(
        reports=tuple(outcome.report for outcome in outcomes.values()),
        skipped=session.plan.skipped,
        masks={name: full(parameter) != 0 for name, parameter in prunable.items()},
        sparsity=masking.sparsity(prunable),
        model_sparsity=masking.sparsity(parameters),
        end_to_end_error=unknown,
        end_to_end_bound=None if bound is None else bound / (session.reference.norms[session.last] or 1.0),
        output_distance=unknown,
        output_norm=unknown,
        seconds=unknown,
    )


def _end_to_end_bound(layers: Mapping[str, Layer], outcomes: Mapping[str, LayerOutcome]) -> float | None:
    """Σ ε̂ℓ Π_{j>ℓ} ‖Ŵⱼ‖₂, increased by 1e-5 of it for rounding; ``None`` if the layers are not a chain.

    A layer adds its own error to that of the layer before it, which its weights scale by at most their spectral norm;
    ReLU does not increase it.
    """
    if not all(outcome.chained for outcome in outcomes.values()):
        return None
    bound = 0.0
    for name, outcome in outcomes.items():
        weight = full(outcome.values[layers[name].parameter_names()[0]]).double()
        bound = bound * float(torch.linalg.matrix_norm(weight, 2)) + outcome.trained_distance
    return bound * (1 + 1e-5)
