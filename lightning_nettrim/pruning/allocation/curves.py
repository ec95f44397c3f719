"""Error curves: what keeping few weights of one layer costs, measured by quick solves on part of the inputs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.memory_model import layer_bytes
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.streaming import concatenate, select_outputs
from lightning_nettrim.layers import Layer, masking
from lightning_nettrim.pruning.layer import local_error
from lightning_nettrim.pruning.layer_problem import layer_problem
from lightning_nettrim.pruning.session import CalibrationSession, retried, with_fewer_rows
from lightning_nettrim.pruning.solving import solve_weighted
from lightning_nettrim.runtime.fingerprint import fingerprint
from lightning_nettrim.solvers import Cardinality, refit

QUICK = Cardinality(max_steps=24)
"""The solver of the curves."""

DENSITIES = (0.02, 0.06, 0.15, 0.3, 0.6)
"""At which a curve is measured."""

MIN_ROWS, ROWS_PER_INPUT = 1024, 2
"""A curve is measured on MIN_ROWS rows, or ROWS_PER_INPUT for each input of the layer if these are more."""

MAX_OUTPUTS = 64
"""Number of outputs, approximately, on which a curve is measured."""

MIN_ERROR = 1e-6
"""Smallest error of an interpolated curve."""

ONE_BY_ONE_ON = frozenset({"cpu"})
"""Types of devices on which layers of equal shape are not measured as one batch."""

_Measured = tuple[dict[str, Tensor], tuple[list[int], list[float], float]]
"""Parameters at the reference density, numbers of kept weights, their errors, and the error at the density."""


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
        return kept, [self.at(count) for count in kept]

    def at(self, count: float) -> float:
        """The error with a number of kept weights, log-linear between the points of the curve, at least MIN_ERROR."""
        if len(self.kept) == 1:
            return self.errors[0]
        i = min(max(bisect_left(self.kept, count), 1), len(self.kept) - 1)
        few, many = self.kept[i - 1], self.kept[i]
        more, less = (max(self.errors[j], MIN_ERROR) for j in (i - 1, i))
        return more * (less / more) ** (math.log(count / few) / math.log(many / few))


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

    Layers of equal shape are solved as one batch on an accelerator. The weights of the model are not changed; they must
    be the trained ones.
    """
    batches = {name: batch for batch in _batches(session, names) for name in batch}
    waiting: dict[str, _Measured] = {}
    for i, name in enumerate(names):
        session.run.progress.activity = f"measuring the error curve of {name}"
        session.run.progress.report("measuring error curves", i / len(names))

        def measure(name: str = name) -> _Measured:
            nonlocal session
            if name not in waiting:
                measured, session = retried(session, lambda s: _measure(s, batches[name]), with_fewer_rows)
                waiting.update(measured)
            return waiting.pop(name)

        key = fingerprint(session.fingerprint, repr(session.plan.budgets[name]), reference_density(session))
        with evaluation_mode(session.model):
            values, (kept, errors, error) = session.run.cached(f"curve-{name}", key, measure)
        batches[name].remove(name)
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


def _batches(session: CalibrationSession, names: Sequence[str]) -> list[list[str]]:
    """The layers, those of equal shape together as far as the memory allows; each alone on the CPU."""
    equal: dict[Any, list[str]] = {}
    for name in names:
        layer, rows = session.plan.layers[name], session.plan.rows[name]
        alone = name if layer.parameter.device.type in ONE_BY_ONE_ON else None
        equal.setdefault((alone, type(layer), layer.parameter.shape, layer.inputs, rows), []).append(name)
    batches = []
    for layers in equal.values():
        layer = session.plan.layers[layers[0]]
        each = layer_bytes(layer, _rows(layer))
        size = int(min(max(session.run.available // each, 1), len(layers)))
        batches += [layers[i : i + size] for i in range(0, len(layers), size)]
    return batches


def _measure(session: CalibrationSession, names: Sequence[str]) -> dict[str, _Measured]:
    """The columns of the curves of layers of equal shape, and their parameters and errors at the reference density."""
    part = _on_part(session, names)
    recordings, groups = part.activations.record(*names), dict[Any, dict[str, LayerProblem]]()
    for name in names:
        recording = recordings.pop(name)
        part.reference.put(name, part.activations.response(name, recording), part.processes)
        budget = replace(session.plan.budgets[name], epsilon=None)
        problem = layer_problem(part, name, recording, budget, trained_inputs=True)
        groups.setdefault(_signature(problem), {})[name] = problem
    return {name: value for problems in groups.values() for name, value in _curves(part, problems).items()}


def _signature(problem: LayerProblem) -> tuple[Any, ...]:
    """Equal for problems that can be concatenated; a problem with a slope below zero has one of its own."""
    absent = tuple(getattr(problem, name) is None for name in ("Omega", "offset", "penalty"))
    alone = None if problem.rectifier.slope is None else id(problem)
    return problem.X.shape, problem.Y.shape, absent, str(problem.rectifier), problem.pattern, problem.ridge, alone


def _curves(session: CalibrationSession, problems: Mapping[str, LayerProblem]) -> dict[str, _Measured]:
    """What `_measure` returns, for problems with the same signature."""
    first = next(iter(problems.values()))
    joint, outputs = concatenate(list(problems.values())), _sampled_outputs(first)
    sampled = {name: select_outputs(problem, outputs) for name, problem in problems.items()}
    importance = {name: factor[..., outputs] for name, factor in session.importance.items() if name in problems}
    points, solved, spectrum = dict[int, list[float]](), dict[float, tuple[Tensor, list[float]]](), None
    for density in DENSITIES:
        at = replace(select_outputs(joint, outputs), sparsity=1 - density)
        kept = replace(first, sparsity=1 - density).nonzeros
        if kept:
            W, points[kept], spectrum = _solve(at, sampled, importance, spectrum)
            solved[density] = W, points[kept]
    points[first.num_prunable] = [0.0] * len(problems)
    reference = reference_density(session)
    curves = zip(*points.values(), strict=True)
    if reference not in solved:
        return {
            name: (session.dense_values(name), ([*points], [*curve], 0.0))
            for name, curve in zip(problems, curves, strict=True)
        }
    W, of_sample = solved[reference]
    errors = of_sample
    if W.shape != joint.W.shape:
        W, errors, _ = _solve(replace(joint, sparsity=1 - reference), problems, session.importance, spectrum)
    measured: dict[str, _Measured] = {}
    for name, w, curve, error, sample in zip(problems, W.split(first.groups), curves, errors, of_sample, strict=True):
        scale = error / sample if sample > 0 else 1.0
        values = session.folded_layers[name].to_parameters(w)
        measured[name] = values, ([*points], [scale * value for value in curve], error)
    return measured


def _solve(
    joint: LayerProblem, problems: Mapping[str, LayerProblem], importance: Mapping[str, Tensor], spectrum: Any
) -> tuple[Tensor, list[float], Any]:
    """Weights and local errors of a quick solve of several layers as one batch, and its spectrum."""
    factors = None
    if any(name in importance for name in problems):
        ones = joint.Y.new_ones(joint.groups, 1, joint.Y.shape[-1])
        factors = torch.cat([ones * importance.get(name, ones) for name in problems])
    solution = solve_weighted(joint, QUICK, factors, spectrum)
    W = refit(joint, solution.W, max_steps=2, cg_steps=8)
    parts = zip(problems.values(), W.split(joint.groups), strict=True)
    return W, [local_error(problem, w) for problem, w in parts], solution.state


def _sampled_outputs(problem: LayerProblem) -> slice:
    """About `MAX_OUTPUTS` evenly spaced outputs; all of them, if the pattern does not divide the sample."""
    N, M = problem.X.shape[-1], problem.Y.shape[-1]
    step = max(M // MAX_OUTPUTS, 1)
    try:
        problem.pattern.check(N, problem.groups * -(-M // step))
    except ValueError:
        step = 1
    return slice(None, None, step)


def _rows(layer: Layer) -> int:
    """Number of rows on which the curve of a layer is measured, if there are as many."""
    return max(MIN_ROWS, ROWS_PER_INPUT * layer.inputs)


def _on_part(session: CalibrationSession, names: Sequence[str]) -> CalibrationSession:
    """A session on as many inputs as give layers of equal shape enough rows, without reference outputs."""
    activations, name = session.activations, names[0]
    rows = _rows(session.plan.layers[name])
    part = activations.first_inputs(math.ceil(rows * activations.calibration_set.inputs / session.plan.rows[name]))
    return replace(
        session,
        activations=replace(part, rows=dict.fromkeys(names, min(rows, activations.rows[name]))),
        reference=ReferenceOutputs(session.run.store, session.run.available),
    )
