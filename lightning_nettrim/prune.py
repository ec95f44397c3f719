"""Prune: a model with its calibration sample and its trained responses, pruned to budgets as often as one likes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lightning_nettrim import mask, norms
from lightning_nettrim.capture import Tape, evaluating
from lightning_nettrim.fold import Fold
from lightning_nettrim.layers import Layer, joined
from lightning_nettrim.method import Method
from lightning_nettrim.outcome import discrepancy_bound, length, row
from lightning_nettrim.plan import Budget, Plan
from lightning_nettrim.pose import pose
from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.ranks import ALONE, Ranks
from lightning_nettrim.rectifier import Rectifier
from lightning_nettrim.report import LayerReport, TrimResult
from lightning_nettrim.sample import Inputs
from lightning_nettrim.signals import Signals
from lightning_nettrim.solvers import Solution, Solver

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How a `Pruner` goes about it.

    Args:
        scheme: ``"cascade"`` or ``"parallel"``.
        solver: the method; ``None`` is `Cardinality` for a sparsity and `ADMM` for an epsilon.
        num_samples: rows per layer at most.
        seed: of that sample.
        penalize_bias: let biases be pruned like weights.
        importance: ``"outgoing"`` or ``"equal"``, what a neuron's error counts in `Cardinality`.
        recalibrate: re-estimate the running statistics of BatchNorms.
        ranks: the processes that do this together, each on inputs of its own.
    """

    scheme: str
    solver: Solver | None
    num_samples: int
    seed: int
    penalize_bias: bool
    importance: str
    recalibrate: bool
    ranks: Ranks = ALONE


class Pruner:
    """The layers of a plan, their trained responses on the held inputs, and what of a solve can be used again.

    Args:
        model: a trained module.
        todo: which layers, how they are used.
        held: what `hold` returned.
        settings: how to go about it.
    """

    def __init__(self, model: nn.Module, todo: Plan, held: Sequence[Inputs], settings: Settings) -> None:
        self.model, self.todo, self.settings = model, todo, settings
        penalize_bias = settings.penalize_bias
        self.folds = {
            name: Fold.of(layer, todo.flows[name], model, penalize_bias) for name, layer in todo.layers.items()
        }
        self.signals = Signals(model, todo, self.folds, held, settings.num_samples, settings.seed, settings.ranks)
        known = [name for name, layer in todo.norms.items() if layer is not None]
        self._norms = known if settings.recalibrate else []
        written = {key for fold in self.folds.values() for key in fold.written}
        own = {key for name in self._norms for key, _ in _state(model, name)}
        self.dense = mask.copies(model, sorted(written | own))
        self.last = next(reversed(todo.layers))
        self.doing = "choosing budgets"
        with evaluating(model):
            self.trained = self.signals.answers()
            outgoing = settings.importance == "outgoing"
            self.method = Method(
                settings.solver, penalize_bias, self.signals.importance(self.weights()) if outgoing else {}
            )

    def smaller(self, size: int, solver: Solver) -> Pruner:
        """Another one of the trained model, on about so many of the inputs, by another solver."""
        self.restore()
        held = self.signals.probe(size).held
        samples = min(size, self.settings.num_samples)
        return Pruner(self.model, self.todo, held, replace(self.settings, solver=solver, num_samples=samples))

    @property
    def prunable(self) -> list[str]:
        """Names of the parameters that may get zeros."""
        return [name for layer in self.todo.layers.values() for name in layer.names(self.settings.penalize_bias)]

    def sizes(self) -> dict[str, int]:
        """Prunable weights of each layer."""
        return {name: W[0].numel() * len(W) for name, W in self.weights().items()}

    def weights(self) -> dict[str, Tensor]:
        """``{name: (groups, N, M)}``: the prunable weights of each layer, as trained."""
        bias = self.settings.penalize_bias
        return {name: fold.W if bias else fold.W[:, : fold.layer.inputs] for name, fold in self.folds.items()}

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
                self.doing, began = f"solving {name}", time.perf_counter()
                chained &= self._plain(name)
                tapes = self.signals.tapes(*([before] if chained and before is not None else []), name)
                trained_signal = self.settings.scheme == "parallel" or before is None
                self._expect_calls(name, tapes.get(name))
                problem = self.pose(name, tapes[name], budgets[name], trained_signal)
                solution, W, values = self._solve(name, problem, budgets[name], trained_signal)
                pruned |= values
                if self.settings.scheme == "cascade":
                    mask.swap(self.model, values)
                    self._recalibrate(budgets, name)
                if chained and before is not None:
                    chained = self.signals.feeds(before, tapes[before], tapes[name])
                if chained:
                    signal = problem.X if before is None else self.folds[name].rows(self.trained[before][0])
                    errors[name] = length(replace(problem, X=signal).response(W) - problem.Y, problem.ranks)
                zeros = self._zeros(layer, values)
                reports.append(row(layer, problem, solution, W, zeros, time.perf_counter() - began))
                if tell is not None:
                    tell(reports[-1])
                before = name
            self.doing = "measuring the pruned network"
            if self.settings.scheme == "parallel":
                mask.swap(self.model, pruned)
                for name in self.todo.layers:
                    self._recalibrate(budgets, name)
            kept = [name for name in self._norms if self._is_part(budgets, name)]
            mask.swap(self.model, norms.moved(self.model, kept, self.signals.held, self.settings.ranks))
            tapes = self.signals.tapes(*self.todo.layers, inputs=False)
            distances = {}
            for name in self.todo.layers:
                self._expect_calls(name, tapes.get(name))
                distances[name] = self.length(self.signals.answer(name, tapes[name]) - self.trained[name])
        sizes = {name: self.length(self.trained[name]) for name in self.trained}
        parameters = dict(self.model.named_parameters())
        return TrimResult(
            reports=tuple(replace(r, discrepancy=distances[r.name] / (sizes[r.name] or 1.0)) for r in reports),
            skipped=self.todo.skipped,
            masks={name: parameters[name].detach() != 0 for name in self.prunable},
            sparsity=mask.sparsity({name: parameters[name] for name in self.prunable}),
            model_sparsity=mask.sparsity(parameters),
            discrepancy=distances[self.last],
            discrepancy_bound=discrepancy_bound(errors, pruned, self.todo) if chained else None,
            response_norm=sizes[self.last],
            seconds=time.perf_counter() - start,
        )

    def pose(self, name: str, tape: Tape, wanted: Budget, trained_signal: bool) -> LayerProblem:
        """One layer's program on what was recorded."""
        X, offset = self.signals.inputs(name, tape), self.signals.offset(name, tape)
        convex = self.method.of(wanted).convex
        ranks = self.settings.ranks
        return pose(self.folds[name], X, self.trained[name], offset, wanted, convex, trained_signal, ranks)

    def length(self, R: Tensor) -> float:
        """‖R‖ of the rows of all processes."""
        return length(R, self.settings.ranks)

    def trained_values(self, name: str) -> dict[str, Tensor]:
        """The parameters of a layer, and of what follows it, as trained."""
        return {key: self.dense[key] for key in self.folds[name].written}

    def _solve(
        self, name: str, problem: LayerProblem, wanted: Budget, trained_signal: bool
    ) -> tuple[Solution, Tensor, dict[str, Tensor]]:
        """The solution, its folded weights after the refit, and them as parameters."""
        if wanted.sparsity == 0:
            return Solution.uncertified(problem.W), problem.W, self.trained_values(name)
        solution, W, values = self.method.solve(name, self.folds[name], problem, wanted, trained_signal)
        self.settings.ranks.check_same(values)
        return solution, W, values

    def _recalibrate(self, budgets: Mapping[str, Budget], layer: str) -> None:
        """Re-estimate, one by one, the BatchNorms that run next after a layer and are no part of a solution."""
        for name in self._norms:
            if self.todo.norms[name] == layer and not self._is_part(budgets, name):
                mask.swap(self.model, norms.reestimated(self.model, name, self.signals.held, self.settings.ranks))

    def _is_part(self, budgets: Mapping[str, Budget], norm: str) -> bool:
        """Whether a layer was solved behind a BatchNorm, whose answers are right then and have to stay."""
        return any(
            flow.norm == norm and (self.method.of(budgets[name]).behind or budgets[name].refit)
            for name, flow in self.todo.flows.items()
        )

    def _expect_calls(self, name: str, tape: Tape | None) -> None:
        """Raise ValueError unless a layer saw as many rows as in the trained network."""
        rows, trained = 0 if tape is None else tape.rows, self.trained[name].shape[1]
        with self.settings.ranks.together():
            if rows != trained:
                raise ValueError(
                    f"{name}: expected to be called as in the trained network, on {trained} rows, got {rows}: the"
                    " network decides by its signals whether to call it; ignore it"
                )

    def _plain(self, name: str) -> bool:
        """Whether a layer is a matrix and a ReLU at most, for which errors are known to add up."""
        flow = self.todo.flows[name]
        relu = flow.rectifier is None or flow.rectifier.same(Rectifier())
        return self.todo.layers[name].kind == "Linear" and flow.norm is None and not flow.sums and relu

    def _zeros(self, layer: Layer, values: Mapping[str, Tensor]) -> int:
        """Exact zeros among the prunable values of a layer, in its own precision."""
        own = layer.names(self.settings.penalize_bias)
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
                type(error).__name__, self.doing, ", ".join(self.todo.layers),
            )  # fmt: skip
            raise


def _state(model: nn.Module, norm: str) -> list[tuple[str, Tensor]]:
    """The parameters and the running statistics of a BatchNorm, by name."""
    module = model.get_submodule(norm)
    statistics = [(key, value) for key, value in module.named_buffers() if key != "num_batches_tracked"]
    return [(joined(norm, key), value) for key, value in [*module.named_parameters(), *statistics]]
