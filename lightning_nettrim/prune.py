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

from lightning_nettrim import mask
from lightning_nettrim.allocate import Curve
from lightning_nettrim.capture import evaluating
from lightning_nettrim.layers import matrix, parameters_of, with_bias
from lightning_nettrim.pattern import Pattern
from lightning_nettrim.plan import Budget, Plan
from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.report import LayerReport, TrimResult
from lightning_nettrim.sample import Inputs
from lightning_nettrim.signals import Signals
from lightning_nettrim.solvers import ADMM, Cardinality, Solution, Solver, Status, fewest, refit, solve

log = logging.getLogger(__name__)

GAMMA = 1.1
"""Slack γ of the cascade's ball, ε² ≥ γ‖(XW − Y)_Ω‖², which keeps the trained weights feasible [Aghasi et al. 2020]."""

PROBE = 1024
"""Inputs, about, on which the effect of a layer on the network is measured."""

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
    ) -> None:
        self.model, self.todo, self.scheme, self.solver, self.penalize_bias = model, todo, scheme, solver, penalize_bias
        self.signals = Signals(model, todo, held, num_samples, seed)
        self.original = {name: matrix(layer) for name, layer in todo.layers.items()}
        self.dense = {
            parameter: value.clone()
            for name, layer in todo.layers.items()
            for parameter, value in parameters_of(name, layer, self.original[name]).items()
        }
        self._last = next(reversed(todo.layers))
        self._curves: dict[str, Curve] = {}
        self._states: dict[str, Any] = {}  # of the last solve on a layer's trained signal
        self._current = "choosing budgets"
        with evaluating(model):
            self.trained = self.signals.answers()
            self._reading = self.signals.importance(self.original) if importance == "outgoing" else {}

    @property
    def prunable(self) -> list[str]:
        """Names of the parameters that may get zeros."""
        return [name for name in self.dense if self.penalize_bias or name.endswith("weight")]

    def sizes(self) -> dict[str, int]:
        """Prunable weights of each layer."""
        return {name: self._weights(name).numel() for name in self.todo.layers}

    def weights(self) -> dict[str, Tensor]:
        """The prunable weights of each layer, as trained."""
        return {name: self._weights(name) for name in self.todo.layers}

    def _weights(self, name: str) -> Tensor:
        rows = len(self.original[name]) if self.penalize_bias else self.todo.layers[name].in_features
        return self.original[name][:rows]

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
                tapes = self.signals.tapes(before, name)
                X, Y = self.signals.inputs(name, tapes[name]), self.trained[name]
                trained_signal = self.scheme == "parallel" or before is None
                problem = self.pose(name, X, Y, budgets[name], trained_signal)
                solution, W = self._solve(name, problem, budgets[name], trained_signal)
                pruned |= parameters_of(name, layer, W)
                if self.scheme == "cascade":
                    mask.swap(self.model, parameters_of(name, layer, W))
                chained &= before is None or self.signals.feeds(before, tapes[before], tapes[name])
                signal = X if before is None else with_bias(layer, self.trained[before]) if chained else None
                if signal is not None:
                    errors[name] = _length(replace(problem, X=signal).response(W) - Y)
                reports.append(_report(name, layer, problem, solution, W, time.perf_counter() - began))
                if tell is not None:
                    tell(reports[-1])
                before = name
            self._current = "measuring the pruned network"
            mask.swap(self.model, pruned)
            answers = self.signals.answers()
        distances = {name: _length(answers[name] - self.trained[name]) for name in answers}
        norms = {name: _length(self.trained[name]) for name in self.trained}
        parameters = dict(self.model.named_parameters())
        return TrimResult(
            reports=tuple(replace(r, discrepancy=distances[r.name] / (norms[r.name] or 1.0)) for r in reports),
            skipped=self.todo.skipped,
            masks={name: parameters[name].detach() != 0 for name in self.prunable},
            sparsity=mask.sparsity({name: parameters[name] for name in self.prunable}),
            model_sparsity=mask.sparsity(parameters),
            discrepancy=distances[self._last],
            discrepancy_bound=_discrepancy_bound(errors, pruned, self.todo) if chained else None,
            response_norm=norms[self._last],
            seconds=time.perf_counter() - start,
        )

    def curves(self, names: Sequence[str]) -> dict[str, Curve]:
        """What it costs to prune each of these layers alone, in its pattern, by a quick `Cardinality` and refit."""
        missing = [name for name in names if name not in self._curves]
        with evaluating(self.model):
            self.restore()
            probe = self.signals.probe(PROBE)
            trained = probe.answers(self._last)[self._last]
            scale = _length(trained) or 1.0
            for name in missing:
                self._current = f"measuring the curve of {name}"
                layer, budget = self.todo.layers[name], self.todo.budgets[name]
                X = self.signals.inputs(name, self.signals.tapes(None, name)[name])
                state, points = self._states.get(name), []
                for density in DENSITIES:
                    asked = replace(budget, sparsity=1 - density, epsilon=None)
                    problem = self.pose(name, X, self.trained[name], asked, True)
                    if not problem.nonzeros:
                        continue
                    solution = self._weighed(name, problem, QUICK, state)
                    state = solution.state
                    W = refit(problem, solution.W, steps=2, inner=8)
                    mask.swap(self.model, parameters_of(name, layer, W))
                    answer = probe.answers(self._last)[self._last]
                    effect = _length(answer - trained) / scale
                    points.append((problem.nonzeros, float(problem.relative_error(W)), effect))
                mask.swap(self.model, parameters_of(name, layer, self.original[name]))
                if self.scheme == "parallel" or name == next(iter(self.todo.layers)):
                    self._states[name] = state
                points = [*dict((p[0], p) for p in points).values(), (self._weights(name).numel(), 0.0, 0.0)]
                self._curves[name] = Curve(*(tuple(column) for column in zip(*points, strict=True)))
        return {name: self._curves[name] for name in names}

    def pose(self, name: str, X: Tensor, Y: Tensor, wanted: Budget, trained_signal: bool) -> LayerProblem:
        """One layer's program: parallel on the trained signal, else the cascade's.

        For the convex program, of which the trained weights must stay feasible, the cascade asks ε² ≥ γ‖(XW − Y)_Ω‖²
        and takes V = max(XW, 0) for its ceiling: what is below zero off Ω is zero after the ReLU, so the paper's V = XW
        would only forbid answers that are as good. Other methods answer as the trained layer did.
        """
        layer, W = self.todo.layers[name], self.original[name]
        free = layer.bias is not None and not self.penalize_bias
        problem = LayerProblem(
            X,
            Y,
            W,
            sparsity=wanted.sparsity,
            Omega=Y > 0 if self.todo.flows[name].relu else None,
            penalty=torch.cat([X.new_ones(layer.in_features), X.new_zeros(1)]) if free else None,
            pattern=Pattern(wanted.pattern),
        )
        norm = torch.linalg.matrix_norm(Y)
        radius = (wanted.epsilon or 1e-3) * torch.where(norm > 0, norm, 1)
        if not self.solver_of(wanted).convex:
            return replace(problem, epsilon=radius)
        XW = X @ W
        missed = torch.linalg.matrix_norm(problem.on_Omega(XW - Y)) * GAMMA**0.5
        ceiling = None if trained_signal or problem.Omega is None else XW.clamp(min=0)
        return replace(problem, epsilon=torch.maximum(radius, missed), V=ceiling)

    def solver_of(self, wanted: Budget) -> Solver:
        """The method for a budget."""
        return method(self.solver, wanted.epsilon)

    def _solve(self, name: str, problem: LayerProblem, wanted: Budget, trained_signal: bool) -> tuple[Solution, Tensor]:
        """The solution, and its weights after the refit towards the trained responses themselves."""
        if wanted.sparsity == 0:
            return Solution.uncertified(problem.W), problem.W
        solver = self.solver_of(wanted)
        if wanted.epsilon is not None and not solver.convex:
            solution = fewest(problem, solver, wanted.refit)
        else:
            again = trained_signal and isinstance(solver, Cardinality)
            solution = self._weighed(name, problem, solver, self._states.get(name) if again else None)
            if again:
                self._states[name] = solution.state
        if not wanted.refit:
            return solution, solution.W
        effort: dict[str, Any] = {} if solver.convex else {"inner": 10, "rtol": 3e-3}
        return solution, refit(replace(problem, V=None), solution.W, **effort)

    def _weighed(self, name: str, problem: LayerProblem, solver: Solver, state: Any) -> Solution:
        """Solve, with each neuron's error counted as what follows reads it: the ReLU commutes with positive factors."""
        factor = self._reading.get(name)
        if factor is None or not isinstance(solver, Cardinality):
            return solve(problem, solver, state)
        solution = solve(replace(problem, Y=problem.Y * factor, W=problem.W * factor), solver, state)
        return replace(solution, W=solution.W / factor)

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


def method(solver: Solver | None, epsilon: float | None) -> Solver:
    """The solver that was asked for; else `Cardinality` or, at a radius, `ADMM`."""
    return solver or (Cardinality() if epsilon is None else ADMM())


def _length(R: Tensor) -> float:
    """‖R‖_F, summed in double precision."""
    return float(torch.linalg.matrix_norm(R, dtype=torch.float64))


def _discrepancy_bound(errors: Mapping[str, float], pruned: Mapping[str, Tensor], todo: Plan) -> float:
    """Σ ε̂ℓ Π_{j>ℓ} ‖Ŵⱼ‖₂, with 1e-5 on top for the rounding of the sums.

    A layer adds its own error to that of the layer before it, which its weights can stretch by their spectral norm and
    its ReLU not at all.
    """
    bound = 0.0
    for name in todo.layers:
        weight = pruned[f"{name}.weight" if name else "weight"].double()
        bound = bound * float(torch.linalg.matrix_norm(weight, 2)) + errors[name]
    return bound * (1 + 1e-5)


def _report(
    name: str, layer: nn.Linear, problem: LayerProblem, solution: Solution, W: Tensor, seconds: float
) -> LayerReport:
    """The row of one layer, but for its discrepancy, which only the finished network shows."""
    prunable_weights = W[(problem.weights > 0).squeeze(-1)].to(layer.weight.dtype)
    zeros = prunable_weights.numel() - int(prunable_weights.count_nonzero())
    norm = torch.linalg.matrix_norm(problem.Y)

    def known(value: Tensor) -> float | None:
        return float(value) if bool(value.isfinite()) else None

    return LayerReport(
        name=name,
        type=type(layer).__name__,
        shape=tuple(layer.weight.shape),
        sparsity=zeros / prunable_weights.numel(),
        zeros=zeros,
        relative_error=float(problem.relative_error(W)),
        discrepancy=float("nan"),
        objective=known(solution.objective),
        bound=known(solution.bound),
        duality_gap=known(solution.gap),
        violation=known(solution.violation),
        epsilon=known(solution.epsilon / torch.where(norm > 0, norm, 1)),
        pattern=problem.pattern.name,
        steps=int(solution.steps),
        seconds=seconds,
        status=Status(int(solution.status)).name,
    )
