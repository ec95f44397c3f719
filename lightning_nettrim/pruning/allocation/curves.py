"""Error curves: what keeping few weights of one layer costs, measured by quick solves."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.reference import norm_over_processes
from lightning_nettrim.layers import masking
from lightning_nettrim.pruning.layer import local_error
from lightning_nettrim.pruning.layer_problem import layer_problem
from lightning_nettrim.pruning.session import CalibrationSession, retried, with_fewer_rows
from lightning_nettrim.pruning.solving import solve_weighted
from lightning_nettrim.runtime.fingerprint import fingerprint
from lightning_nettrim.solvers import Cardinality, refit

PROBE_INPUTS = 1024
"""Inputs, approximately, on which the effect of a layer on the output is measured."""

QUICK = Cardinality(max_steps=30, row_parts=4)
"""The solver of the curves."""

DENSITIES = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5)
"""At which a curve is measured."""

MIN_EFFECT = 1e-6
"""Smallest effect of an interpolated curve."""


@dataclass(frozen=True)
class ErrorCurve:
    """The errors that result from pruning one layer alone, all others dense.

    Attributes:
        kept: numbers of kept weights, ascending; the last is all of them.
        local_errors: of the layer's response, relative, at each.
        output_errors: of the last layer's response, relative, at each.
    """

    kept: tuple[int, ...]
    local_errors: tuple[float, ...]
    output_errors: tuple[float, ...]

    def fewest_within(self, error: float) -> float:
        """The fewest weights with at most this local error, log-linear between the points of the curve."""
        kept, errors = self.kept, self.local_errors
        for few, many, more, less in zip(kept, kept[1:], errors, errors[1:], strict=False):
            if less <= error:
                if more <= error:
                    return few
                if less <= 0:
                    return many
                return few * (many / few) ** (math.log(more / error) / math.log(more / less))
        return kept[-1]

    def on_grid(self, points: int = 256) -> tuple[list[float], list[float]]:
        """Numbers of kept weights and output errors on a fine grid, log-linear between the points of the curve."""
        low, high = math.log(self.kept[0]), math.log(self.kept[-1])
        kept = [math.exp(low + (high - low) * i / (points - 1)) for i in range(points)]
        errors = []
        for count in kept:
            i = min(max(bisect_left(self.kept, count), 1), len(self.kept) - 1)
            few, many = self.kept[i - 1], self.kept[i]
            more, less = (max(self.output_errors[j], MIN_EFFECT) for j in (i - 1, i))
            errors.append(more * (less / more) ** (math.log(count / few) / math.log(many / few)))
        return kept, errors


def measure_curves(session: CalibrationSession, names: Sequence[str]) -> dict[str, ErrorCurve]:
    """The error curves of layers; measured once per session, also over interrupted runs.

    The model has its trained weights afterwards.
    """
    curves = {}
    with evaluation_mode(session.model):
        session.restore()
        for i, name in enumerate(names):
            session.run.progress.activity = f"measuring the error curve of {name}"
            session.run.progress.report("measuring error curves", i / len(names))

            def measure(name: str = name) -> tuple[list[int], list[float], list[float]]:
                nonlocal session
                columns, session = retried(session, lambda s: _measure(s, name), with_fewer_rows)
                return columns

            key = fingerprint(session.fingerprint, repr(session.plan.budgets[name]))
            kept, local, output = session.run.cached(f"curve-{name}", key, measure)
            curves[name] = ErrorCurve(tuple(kept), tuple(local), tuple(output))
            session.restore()
    return curves


def _trained_output(session: CalibrationSession, probe: Activations) -> Tensor:
    """The trained response of the last layer on the probe's inputs, recorded once per session."""
    key = "trained output of the probe"
    if key not in session.run.cache or session.run.cache[key][0] is not session.activations:
        session.run.cache[key] = session.activations, probe.responses(session.last)[session.last]
    return session.run.cache[key][1]


def _measure(session: CalibrationSession, name: str) -> tuple[list[int], list[float], list[float]]:
    """The columns of the curve of one layer; the model is left with that layer pruned."""
    session.restore()
    probe = session.activations.first_inputs(PROBE_INPUTS)
    trained = _trained_output(session, probe)
    norm = norm_over_processes(trained, session.processes) or 1.0
    folded, budget = session.folded_layers[name], replace(session.plan.budgets[name], epsilon=None)
    recording = session.activations.record(name, outputs=()).pop(name)
    problem = layer_problem(session, name, recording, budget, trained_inputs=True)
    state, points = session.solver_states.get(name, folded.W.device), {}
    for density in DENSITIES:
        at = replace(problem, sparsity=1 - density)
        if not at.nonzeros:
            continue
        solution = solve_weighted(session, name, at, QUICK, state)
        state = solution.state
        W = refit(at, solution.W, max_steps=2, cg_steps=8)
        masking.assign(session.model, folded.to_parameters(W))
        change = norm_over_processes(probe.responses(session.last)[session.last] - trained, session.processes)
        points[at.nonzeros] = local_error(at, W), change / norm
    if session.config.scheme == "parallel" or name == next(iter(session.plan.layers)):
        session.solver_states.put(name, state)
    points[session.sizes()[name]] = 0.0, 0.0
    local_errors, output_errors = zip(*points.values(), strict=True)
    return [*points], [*local_errors], [*output_errors]
