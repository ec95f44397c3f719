"""Error curves: what keeping few weights of one layer costs, measured by quick solves on part of the inputs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.streaming import select_outputs
from lightning_nettrim.layers import masking
from lightning_nettrim.pruning.layer import local_error
from lightning_nettrim.pruning.layer_problem import layer_problem
from lightning_nettrim.pruning.session import CalibrationSession, retried, with_fewer_rows
from lightning_nettrim.pruning.solving import solve_weighted
from lightning_nettrim.runtime.fingerprint import fingerprint
from lightning_nettrim.solvers import Cardinality, refit

QUICK = Cardinality(max_steps=30, row_parts=4)
"""The solver of the curves."""

DENSITIES = (0.02, 0.06, 0.15, 0.3, 0.6)
"""At which a curve is measured."""

MIN_ROWS, ROWS_PER_INPUT = 1024, 2
"""A curve is measured on MIN_ROWS rows, or ROWS_PER_INPUT for each input of the layer if these are more."""

MAX_OUTPUTS = 64
"""Number of outputs, approximately, on which a curve is measured."""

MIN_ERROR = 1e-6
"""Smallest error of an interpolated curve."""


@dataclass(frozen=True)
class ErrorCurve:
    """The local errors that result from pruning one layer alone.

    Attributes:
        kept: numbers of kept weights, ascending; the last is all of them.
        errors: of the layer's response, relative, at each.
    """

    kept: tuple[int, ...]
    errors: tuple[float, ...]

    def fewest_within(self, error: float) -> float:
        """The fewest weights with at most this error, log-linear between the points of the curve."""
        for few, many, more, less in zip(self.kept, self.kept[1:], self.errors, self.errors[1:], strict=False):
            if less <= error:
                if more <= error:
                    return few
                if less <= 0:
                    return many
                return few * (many / few) ** (math.log(more / error) / math.log(more / less))
        return self.kept[-1]

    def on_grid(self, points: int = 256) -> tuple[list[float], list[float]]:
        """Numbers of kept weights and errors on a fine grid, log-linear between the points of the curve."""
        if len(self.kept) == 1:
            return [float(self.kept[0])], [self.errors[0]]
        low, high = math.log(self.kept[0]), math.log(self.kept[-1])
        kept = [math.exp(low + (high - low) * i / (points - 1)) for i in range(points)]
        errors = []
        for count in kept:
            i = min(max(bisect_left(self.kept, count), 1), len(self.kept) - 1)
            few, many = self.kept[i - 1], self.kept[i]
            more, less = (max(self.errors[j], MIN_ERROR) for j in (i - 1, i))
            errors.append(more * (less / more) ** (math.log(count / few) / math.log(many / few)))
        return kept, errors


@dataclass(frozen=True, eq=False)
class MeasuredLayer:
    """One layer, pruned alone.

    Attributes:
        curve: its error curve.
        error: its local error at a density near that of the network.
        values: its parameters at that density, by name.
    """

    curve: ErrorCurve
    error: float
    values: dict[str, Tensor]


def measure_layers(session: CalibrationSession, names: Sequence[str]) -> Iterator[tuple[str, MeasuredLayer]]:
    """Prune layers one by one at several densities; measured once per session, also over interrupted runs.

    The weights of the model are not changed; they must be the trained ones.
    """
    for i, name in enumerate(names):
        session.run.progress.activity = f"measuring the error curve of {name}"
        session.run.progress.report("measuring error curves", i / len(names))

        def measure(name: str = name) -> tuple[dict[str, Tensor], tuple[list[int], list[float], float]]:
            nonlocal session
            measured, session = retried(session, lambda s: _measure(s, name), with_fewer_rows)
            return measured

        key = fingerprint(session.fingerprint, repr(session.plan.budgets[name]), reference_density(session))
        with evaluation_mode(session.model):
            values, (kept, errors, error) = session.run.cached(f"curve-{name}", key, measure)
        values = masking.divided(session.model, values)
        yield name, MeasuredLayer(ErrorCurve(tuple(kept), tuple(errors)), error, values)


def measure_curves(session: CalibrationSession, names: Sequence[str]) -> dict[str, ErrorCurve]:
    """The error curves of layers."""
    session.restore()
    return {name: measured.curve for name, measured in measure_layers(session, names)}


def reference_density(session: CalibrationSession) -> float:
    """The measured density that is nearest to that of the network; the middle one if it is searched."""
    sparsity = session.config.sparsity
    if sparsity is None or sparsity == 1:
        return DENSITIES[len(DENSITIES) // 2]
    return min(DENSITIES, key=lambda density: abs(math.log(density / (1 - sparsity))))


def _measure(session: CalibrationSession, name: str) -> tuple[dict[str, Tensor], tuple[list[int], list[float], float]]:
    """The columns of the curve of one layer, and its parameters and error at the reference density."""
    part = _on_part(session, name)
    recording = part.activations.record(name).pop(name)
    part.reference.put(name, part.activations.response(name, recording), part.processes)
    folded, budget = session.folded_layers[name], replace(session.plan.budgets[name], epsilon=None)
    problem = layer_problem(part, name, recording, budget, trained_inputs=True)
    outputs = _sampled_outputs(problem)
    sample = replace(part, importance={key: factor[..., outputs] for key, factor in part.importance.items()})
    points, solved, spectrum = dict[int, float](), dict[float, tuple[Tensor, float]](), None
    for density in DENSITIES:
        kept = replace(problem, sparsity=1 - density).nonzeros
        if kept:
            at = replace(select_outputs(problem, outputs), sparsity=1 - density)
            W, points[kept], spectrum = _solve(sample, name, at, spectrum)
            solved[density] = W, points[kept]
    points[session.sizes()[name]] = 0.0
    reference = reference_density(session)
    if reference not in solved:
        return session.dense_values(name), ([*points], [*points.values()], 0.0)
    W, of_sample = solved[reference]
    error = of_sample
    if W.shape != problem.W.shape:
        W, error, _ = _solve(part, name, replace(problem, sparsity=1 - reference), spectrum)
    scale = error / of_sample if of_sample > 0 else 1.0
    return folded.to_parameters(W), ([*points], [scale * value for value in points.values()], error)


def _solve(session: CalibrationSession, name: str, problem: LayerProblem, spectrum: Any) -> tuple[Tensor, float, Any]:
    """Weights and local error of a quick solve, and its spectrum."""
    solution = solve_weighted(session, name, problem, QUICK, spectrum)
    W = refit(problem, solution.W, max_steps=3, cg_steps=8)
    return W, local_error(problem, W), solution.state


def _sampled_outputs(problem: LayerProblem) -> slice:
    """About `MAX_OUTPUTS` evenly spaced outputs; all of them, if the pattern does not divide the sample."""
    N, M = problem.X.shape[-1], problem.Y.shape[-1]
    step = max(M // MAX_OUTPUTS, 1)
    try:
        problem.pattern.check(N, problem.groups * -(-M // step))
    except ValueError:
        step = 1
    return slice(None, None, step)


def _on_part(session: CalibrationSession, name: str) -> CalibrationSession:
    """A session on as many inputs as give the layer enough rows, without reference outputs."""
    activations, inputs = session.activations, session.activations.calibration_set.inputs
    rows = max(MIN_ROWS, ROWS_PER_INPUT * session.plan.layers[name].inputs)
    part = activations.first_inputs(math.ceil(rows * inputs / session.plan.rows[name]))
    return replace(
        session,
        activations=replace(part, rows={name: min(rows, activations.rows[name])}),
        reference=ReferenceOutputs(session.run.store, session.run.available),
    )
