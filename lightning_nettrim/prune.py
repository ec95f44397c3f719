"""Prune: a model with its calibration sample and its trained responses, pruned to budgets as often as one likes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim import mask, norms
from lightning_nettrim.allocate import Curve
from lightning_nettrim.capture import Tape, evaluating
from lightning_nettrim.fold import Fold
from lightning_nettrim.layers import Layer, joined
from lightning_nettrim.outcome import discrepancy_bound, length, relative_error, row
from lightning_nettrim.plan import Budget, Plan
from lightning_nettrim.pose import pose
from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.rectifier import Rectifier
from lightning_nettrim.report import LayerReport, TrimResult
from lightning_nettrim.sample import Inputs
from lightning_nettrim.signals import Signals
from lightning_nettrim.solvers import ADMM, Cardinality, Solution, Solver, fewest, refit, solve

log = logging.getLogger(__name__)

PROBE = 1024
"""Inputs, about, on which the effect of a layer on the network is measured."""

REHEARSAL = 2048
"""Inputs, about, on which an allocation is rehearsed."""

QUICK = Cardinality(steps=30, parts=4)
"""By which a layer's curve is measured."""

DENSITIES = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5)
"""At which a layer's curve is measured."""


class Pruner:
    """The layers of a plan, their trained responses on the held inputs, and what of a solve can be used again.

    Args:
        model: a trained module.
        todo: which layers, how they are used.
        held: what `hold` returned.
        scheme: ``"cascade"`` or ``"parallel"``.
        solver: the method; ``None`` is `Cardinality` for a sparsity and `ADMM` for an epsilon.
        num_samples: rows per layer at most.
        seed: of that sample.
        penalize_bias: let biases be pruned like weights.
        importance: ``"outgoing"`` or ``"equal"``, what a neuron's error counts in `Cardinality`.
        recalibrate: re-estimate the running statistics of BatchNorms.
    """

    def __init__(
        self,
        model: nn.Module,
        todo: Plan,
        held: Sequence[Inputs],
        scheme: str,
        solver: Solver | None,
        num_samples: int,
        seed: int,
        penalize_bias: bool,
        importance: str,
        recalibrate: bool,
    ) -> None:
        self.model, self.todo, self.scheme, self.solver, self.penalize_bias = model, todo, scheme, solver, penalize_bias
        self.folds = {
            name: Fold.of(layer, todo.flows[name], model, penalize_bias) for name, layer in todo.layers.items()
        }
        self.signals = Signals(model, todo, self.folds, held, num_samples, seed)
        self._norms = [name for name, layer in todo.norms.items() if layer is not None] if recalibrate else []
        written = {key for fold in self.folds.values() for key in fold.written}
        own = {key for name in self._norms for key, _ in _state(model, name)}
        self.dense = mask.copies(model, sorted(written | own))
        self._last = next(reversed(todo.layers))
        self._curves: dict[str, Curve] = {}
        self._states: dict[str, Any] = {}  # of the last solve on a layer's trained signal
        self._current = "choosing budgets"
        self._rehearsal: Pruner | None = None
        with evaluating(model):
            self.trained = self.signals.answers()
            self._reading = self.signals.importance(self.weights()) if importance == "outgoing" else {}

    @property
    def prunable(self) -> list[str]:
        """Names of the parameters that may get zeros."""
        names = []
        for layer in self.todo.layers.values():
            own = [layer.weight, *([layer.bias] if layer.bias is not None and self.penalize_bias else [])]
            names += [joined(layer.path, key) for key in own]
        return names

    def sizes(self) -> dict[str, int]:
        """Prunable weights of each layer."""
        parameters = dict(self.model.named_parameters())
        sizes = dict.fromkeys(self.todo.layers, 0)
        for name, layer in self.todo.layers.items():
            own = [layer.weight, *([layer.bias] if layer.bias is not None and self.penalize_bias else [])]
            sizes[name] = sum(parameters[joined(layer.path, key)].numel() for key in own)
        return sizes

    def weights(self) -> dict[str, Tensor]:
        """``{name: (groups, N, M)}``: the prunable weights of each layer, as trained."""
        return {name: self._weights(layer) for name, layer in self.todo.layers.items()}

    def _weights(self, layer: Layer) -> Tensor:
        W = layer.matrix()
        return W if self.penalize_bias else W[:, : layer.inputs]

    def restore(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Put the trained weights back, or those of a snapshot."""
        mask.swap(self.model, self.dense if values is None else values)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the layers' parameters as they are now."""
        return mask.copies(self.model, list(self.dense))

    def prune(self, budgets: Mapping[str, Budget], tell: Callable[[LayerReport], None] | None = None) -> TrimResult:
        """Prune the trained network to these budgets, in place, within `saved`.

        Args:
            budgets: of every layer.
            tell: called with the report of each layer as it is finished; its ``discrepancy`` is still NaN.
        """
        start = time.perf_counter()
        reports: list[LayerReport] = []
        pruned: dict[str, Tensor] = {}
        errors: dict[str, float] = {}  # of each layer alone, on the trained signals
        chained, before = True, None
        with evaluating(self.model):
            self.restore()
            for name, layer in self.todo.layers.items():
                self._current, began = f"solving {name}", time.perf_counter()
                chained &= self._plain(name)
                tapes = self.signals.tapes(*([before] if chained and before is not None else []), name)
                trained_signal = self.scheme == "parallel" or before is None
                self._expect_calls(name, tapes.get(name))
                problem = self.pose(name, tapes[name], budgets[name], trained_signal)
                solution, W, values = self._solve(name, problem, budgets[name], trained_signal)
                pruned |= values
                if self.scheme == "cascade":
                    mask.swap(self.model, values)
                    self._recalibrate(budgets, name)
                if chained and before is not None:
                    chained = self.signals.feeds(before, tapes[before], tapes[name])
                if chained:
                    signal = problem.X if before is None else self.folds[name].rows(self.trained[before][0])
                    errors[name] = length(replace(problem, X=signal).response(W) - problem.Y)
                zeros = self._zeros(layer, values)
                reports.append(row(layer, problem, solution, W, zeros, time.perf_counter() - began))
                if tell is not None:
                    tell(reports[-1])
                before = name
            self._current = "measuring the pruned network"
            if self.scheme == "parallel":
                mask.swap(self.model, pruned)
                for name in self.todo.layers:
                    self._recalibrate(budgets, name)
            kept = [name for name in self._norms if self._is_part(budgets, name)]
            mask.swap(self.model, norms.moved(self.model, kept, self.signals.held))
            tapes = self.signals.tapes(*self.todo.layers, inputs=False)
            distances = {}
            for name in self.todo.layers:
                self._expect_calls(name, tapes.get(name))
                distances[name] = length(self.signals.answer(name, tapes[name]) - self.trained[name])
        sizes = {name: length(self.trained[name]) for name in self.trained}
        parameters = dict(self.model.named_parameters())
        return TrimResult(
            reports=tuple(replace(r, discrepancy=distances[r.name] / (sizes[r.name] or 1.0)) for r in reports),
            skipped=self.todo.skipped,
            masks={name: parameters[name].detach() != 0 for name in self.prunable},
            sparsity=mask.sparsity({name: parameters[name] for name in self.prunable}),
            model_sparsity=mask.sparsity(parameters),
            discrepancy=distances[self._last],
            discrepancy_bound=discrepancy_bound(errors, pruned, self.todo) if chained else None,
            response_norm=sizes[self._last],
            seconds=time.perf_counter() - start,
        )

    def rehearsed(self, budgets: Mapping[str, Budget]) -> float:
        """How much the network's output changes at these budgets, by a quick `Cardinality` on part of the inputs."""
        self._current = "rehearsing an allocation"
        if self._rehearsal is None:
            self.restore()
            part = self.signals.probe(REHEARSAL)
            self._rehearsal = Pruner(
                self.model, self.todo, part.held, self.scheme, QUICK, min(REHEARSAL, part.num_samples), part.seed,
                self.penalize_bias, "outgoing" if self._reading else "equal", bool(self._norms),
            )  # fmt: skip
        try:
            return self._rehearsal.prune(budgets).discrepancy
        finally:
            self.restore()

    def curves(self, names: Sequence[str]) -> dict[str, Curve]:
        """What it costs to prune each of these layers alone, in its pattern, by a quick `Cardinality` and refit."""
        missing = [name for name in names if name not in self._curves]
        with evaluating(self.model):
            self.restore()
            probe = self.signals.probe(PROBE)
            trained = probe.answers(self._last)[self._last]
            scale = length(trained) or 1.0
            for name in missing:
                self._current = f"measuring the curve of {name}"
                fold, budget = self.folds[name], self.todo.budgets[name]
                tape = self.signals.tapes(name)[name]
                state, points = self._states.get(name), []
                for density in DENSITIES:
                    asked = replace(budget, sparsity=1 - density, epsilon=None)
                    problem = self.pose(name, tape, asked, True)
                    if not problem.nonzeros:
                        continue
                    solution = self._weighed(name, problem, QUICK, state)
                    state = solution.state
                    W = refit(problem, solution.W, steps=2, inner=8)
                    mask.swap(self.model, fold.parameters(W))
                    answer = probe.answers(self._last)[self._last]
                    effect = length(answer - trained) / scale
                    points.append((problem.nonzeros, relative_error(problem, W), effect))
                mask.swap(self.model, self._trained_values(name))
                if self.scheme == "parallel" or name == next(iter(self.todo.layers)):
                    self._states[name] = state
                points = [*dict((p[0], p) for p in points).values(), (self.sizes()[name], 0.0, 0.0)]
                self._curves[name] = Curve(*(tuple(column) for column in zip(*points, strict=True)))
        return {name: self._curves[name] for name in names}

    def pose(self, name: str, tape: Tape, wanted: Budget, trained_signal: bool) -> LayerProblem:
        """One layer's program on what was recorded."""
        X, offset = self.signals.inputs(name, tape), self.signals.offset(name, tape)
        convex = self.solver_of(wanted).convex
        return pose(self.folds[name], X, self.trained[name], offset, wanted, convex, trained_signal)

    def solver_of(self, wanted: Budget) -> Solver:
        """The method for a budget."""
        return method(self.solver, wanted.epsilon)

    def _solve(
        self, name: str, problem: LayerProblem, wanted: Budget, trained_signal: bool
    ) -> tuple[Solution, Tensor, dict[str, Tensor]]:
        """The solution, its folded weights after the refit towards the trained responses, and them as parameters."""
        fold, solver = self.folds[name], self.solver_of(wanted)
        if wanted.sparsity == 0:
            return Solution.uncertified(problem.W), problem.W, self._trained_values(name)
        if not solver.behind and wanted.epsilon is None:
            own = fold.W
            solution = solve(
                replace(problem, X=problem.X[..., : own.shape[1]], W=own, penalty=self._penalty(fold, own)), solver
            )
            values = fold.layer.parameters(solution.W)
            solution = replace(solution, W=fold.fold(solution.W))
            if not wanted.refit:
                return solution, solution.W, values
        elif wanted.epsilon is not None and not solver.convex:
            solution = fewest(problem, solver, wanted.refit)
        else:
            again = trained_signal and isinstance(solver, Cardinality)
            solution = self._weighed(name, problem, solver, self._states.get(name) if again else None)
            if again:
                self._states[name] = solution.state
        if not wanted.refit:
            return solution, solution.W, fold.parameters(solution.W)
        effort: dict[str, Any] = {} if solver.convex else {"inner": 10, "rtol": 3e-3}
        W = refit(replace(problem, V=None), solution.W, **effort)
        return solution, W, fold.parameters(W)

    def _penalty(self, fold: Fold, own: Tensor) -> Tensor | None:
        """1 for the prunable rows of a layer's own matrices, 0 for a free bias."""
        if fold.layer.bias is None or self.penalize_bias:
            return None
        return torch.cat([own.new_ones(fold.layer.inputs), own.new_zeros(1)])

    def _weighed(self, name: str, problem: LayerProblem, solver: Solver, state: Any) -> Solution:
        """Solve, with each neuron's error counted as what follows reads it: the ReLU commutes with positive factors."""
        factor = self._reading.get(name)
        bounded = problem.Omega is not None and (problem.rectifier.low != 0 or problem.bounded)
        if factor is None or bounded or not isinstance(solver, Cardinality):
            return solve(problem, solver, state)
        offset = None if problem.offset is None else problem.offset * factor
        solution = solve(replace(problem, Y=problem.Y * factor, W=problem.W * factor, offset=offset), solver, state)
        return replace(solution, W=solution.W / factor)

    def _recalibrate(self, budgets: Mapping[str, Budget], layer: str) -> None:
        """Re-estimate, one by one, the BatchNorms that run next after a layer and are no part of a solution."""
        for name in self._norms:
            if self.todo.norms[name] == layer and not self._is_part(budgets, name):
                mask.swap(self.model, norms.reestimated(self.model, name, self.signals.held))

    def _is_part(self, budgets: Mapping[str, Budget], norm: str) -> bool:
        """Whether a layer was solved behind a BatchNorm, whose answers are right then and have to stay."""
        return any(
            flow.norm == norm and (self.solver_of(budgets[name]).behind or budgets[name].refit)
            for name, flow in self.todo.flows.items()
        )

    def _expect_calls(self, name: str, tape: Tape | None) -> None:
        """Raise ValueError unless a layer saw as many rows as in the trained network."""
        rows, trained = 0 if tape is None else tape.rows, self.trained[name].shape[1]
        if rows != trained:
            raise ValueError(
                f"{name}: expected to be called as in the trained network, on {trained} rows, got {rows}: the network"
                " decides by its signals whether to call it; ignore it"
            )

    def _trained_values(self, name: str) -> dict[str, Tensor]:
        """The parameters of a layer, and of what follows it, as trained."""
        return {key: self.dense[key] for key in self.folds[name].written}

    def _plain(self, name: str) -> bool:
        """Whether a layer is a matrix and a ReLU at most, for which errors are known to add up."""
        flow = self.todo.flows[name]
        relu = flow.rectifier is None or flow.rectifier.same(Rectifier())
        return self.todo.layers[name].kind == "Linear" and flow.norm is None and not flow.sums and relu

    def _zeros(self, layer: Layer, values: Mapping[str, Tensor]) -> int:
        """Exact zeros among the prunable values of a layer, in its own precision."""
        own = {joined(layer.path, layer.weight), joined(layer.path, layer.bias or "")} & set(self.prunable)
        return sum(int((values[key].to(layer.parameter.dtype) == 0).sum()) for key in own)

    @contextmanager
    def saved(self) -> Iterator[None]:
        """A `with` after which, by whatever exception, all layers have their trained weights again."""
        try:
            with mask.restored_on_error(self.model, self.dense):
                yield
        except BaseException as error:
            log.warning(
                "%s while %s: all of %s have their trained weights again",
                type(error).__name__, self._current, ", ".join(self.todo.layers),
            )  # fmt: skip
            raise


def _state(model: nn.Module, norm: str) -> list[tuple[str, Tensor]]:
    """The parameters and the running statistics of a BatchNorm, by name."""
    module = model.get_submodule(norm)
    statistics = [(key, value) for key, value in module.named_buffers() if key != "num_batches_tracked"]
    return [(joined(norm, key), value) for key, value in [*module.named_parameters(), *statistics]]


def method(solver: Solver | None, epsilon: float | None) -> Solver:
    """The solver that was asked for; else `Cardinality` or, at a radius, `ADMM`."""
    return solver or (Cardinality() if epsilon is None else ADMM())
