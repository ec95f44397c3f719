"""Wrappers of a step of the loop over layers: memory retries, resuming, progress, reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from lightning_nettrim.calibration.batch import device_of
from lightning_nettrim.layers import Layer
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.layer import LayerOutcome, prune_layer
from lightning_nettrim.pruning.results import LayerReport
from lightning_nettrim.pruning.session import CalibrationSession, retried, with_fewer_rows
from lightning_nettrim.runtime.fingerprint import fingerprint

Step = Callable[[CalibrationSession, str, Budget, str | None, bool], tuple[LayerOutcome, CalibrationSession]]
"""Prunes one layer, as `prune_layer`; returns the outcome and the session for the next layer."""


def with_memory_retries(
    session: CalibrationSession, name: str, budget: Budget, previous: str | None, chained: bool
) -> tuple[LayerOutcome, CalibrationSession]:
    """`prune_layer`, with fewer rows of the layer if memory runs out; the outcome is equal in all processes."""
    outcome, session = retried(
        session,
        lambda session: prune_layer(session, name, budget, previous, chained),
        lambda session: with_fewer_rows(session, name),
    )
    session.processes.check_identical(outcome.values)
    return outcome, session


def with_resume(step: Step, label: str = "") -> Step:
    """A step that uses the stored outcome of an interrupted run, and stores its own.

    An outcome is used only for the same activations, options, budgets and outcomes of all layers before.

    Args:
        step: to wrap.
        label: prefix of the names of stored outcomes.
    """
    key = ""

    def resumed(
        session: CalibrationSession, name: str, budget: Budget, previous: str | None, chained: bool
    ) -> tuple[LayerOutcome, CalibrationSession]:
        nonlocal key
        resume = session.run.resume
        if resume is None:
            return step(session, name, budget, previous, chained)
        key = fingerprint(key or session.fingerprint, repr(budget), previous)
        entry = resume.read(label + name, key)
        if entry is not None:
            values, metadata = entry
            device = device_of(session.model)
            report = LayerReport(
                **{**metadata.pop("report"), "shape": tuple(session.plan.layers[name].parameter.shape)}
            )
            outcome = LayerOutcome({name: value.to(device) for name, value in values.items()}, report, **metadata)
        else:
            outcome, session = step(session, name, budget, previous, chained)
            metadata = {"trained_distance": outcome.trained_distance, "chained": outcome.chained}
            resume.write(label + name, key, outcome.values, {"report": asdict(outcome.report), **metadata})
        key = fingerprint(key, outcome.values)
        return outcome, session

    return resumed


def with_progress(step: Step) -> Step:
    """A step that reports which fraction of the work has been done before it."""
    done = 0.0

    def reporting(
        session: CalibrationSession, name: str, budget: Budget, previous: str | None, chained: bool
    ) -> tuple[LayerOutcome, CalibrationSession]:
        nonlocal done
        total = sum(_work(layer) for layer in session.plan.layers.values())
        session.run.progress.activity = f"solving {name}"
        session.run.progress.report("pruning", done / total)
        done += _work(session.plan.layers[name])
        return step(session, name, budget, previous, chained)

    return reporting


def with_reports(step: Step, on_layer: Callable[[LayerReport], None] | None) -> Step:
    """A step that calls a function with the report of the layer."""
    if on_layer is None:
        return step

    def reporting(
        session: CalibrationSession, name: str, budget: Budget, previous: str | None, chained: bool
    ) -> tuple[LayerOutcome, CalibrationSession]:
        outcome, session = step(session, name, budget, previous, chained)
        on_layer(outcome.report)
        return outcome, session

    return reporting


def _work(layer: Layer) -> float:
    """The cost of a layer relative to others: a pass over the inputs, the Gram matrix, the steps of the solver."""
    N, M = layer.inputs, layer.outputs
    return 1e8 + layer.groups * (1e3 * N * N + 10.0 * N**3 + 1e3 * N * M)
