"""Prune: a model with its calibration sample and its trained responses, pruned to budgets as often as one likes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_nettrim import mask, norms
from lightning_nettrim.capture import Tape
from lightning_nettrim.digest import digest
from lightning_nettrim.layers import Layer, Linear
from lightning_nettrim.memory import GIB, with_less
from lightning_nettrim.method import Method
from lightning_nettrim.outcome import discrepancy_bound, length, row
from lightning_nettrim.plan import Budget
from lightning_nettrim.pose import pose
from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.rectifier import Rectifier
from lightning_nettrim.replay import evaluating
from lightning_nettrim.report import LayerReport, TrimResult
from lightning_nettrim.shelf import release
from lightning_nettrim.solvers import Magnitude, Solution, Solver, Status
from lightning_nettrim.trained import Trained


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of one layer.

    Attributes:
        values: its parameters, and those of what follows it, by name.
        report: its row.
        error: of its response on the trained signal, where the layers are a plain chain.
        fed: whether they are, up to this one.
    """

    values: dict[str, Tensor]
    report: LayerReport
    error: float
    fed: bool


class Pruner(Trained):
    """Prunes a trained model in place, to budgets, as often as one likes; see `Trained` for its arguments."""

    def smaller(self, size: int, solver: Solver) -> Pruner:
        """Another one of the trained model, on about so many of the inputs, by another solver."""
        self.restore()
        held = self.signals.probe(size).held
        most = min(size, self.settings.max_rows)
        settings = replace(self.settings, solver=solver, max_rows=most)
        rows = {name: min(most, few) for name, few in self.signals.rows.items()}
        smaller = Pruner(self.model, self.todo, held, settings, self.room, self.shelf, rows=rows)
        smaller.notes = self.notes  # whatever it has to do with less is told with the rest
        return smaller

    def prune(
        self,
        budgets: Mapping[str, Budget],
        tell: Callable[[LayerReport], None] | None = None,
        progress: Callable[[str, float], None] | None = None,
        label: str = "",
    ) -> TrimResult:
        """Prune the trained network to these budgets, in place, within `saved`.

        Args:
            budgets: of every layer.
            tell: called with the report of each layer as it is finished; its ``discrepancy`` is still NaN.
            progress: called with what is being done and which fraction of it is.
            label: of the entries in the journal.
        """
        start, work, done = time.perf_counter(), {n: _work(layer) for n, layer in self.todo.layers.items()}, 0.0
        answers: dict[str, Answer] = {}
        chained, before, cause = True, None, self.cause
        with evaluating(self.model):
            self.restore()
            for name in self.todo.layers:
                self.doing = f"solving {name}"
                if progress is not None:
                    progress("pruning", done / sum(work.values()))
                chained &= self._plain(name)
                cause = digest(cause, repr(budgets[name]), before)
                answer = self._known(label + name, cause)
                if answer is None:
                    attempt = partial(self._answer, name, budgets[name], before, chained)
                    answer = with_less(attempt, partial(self.less, name), self.settings.ranks)
                    self.settings.ranks.check_same(answer.values)
                    self._remember(label + name, cause, answer)
                answers[name] = answer
                chained &= answer.fed
                if self.settings.scheme == "cascade":
                    mask.swap(self.model, answer.values)
                    self._recalibrate(budgets, name)
                if tell is not None:
                    tell(answer.report)
                cause, before, done = digest(cause, answer.values), name, done + work[name]
            self.doing = "measuring the pruned network"
            pruned = {key: value for answer in answers.values() for key, value in answer.values.items()}
            if self.settings.scheme == "parallel":
                mask.swap(self.model, pruned)
                for name in self.todo.layers:
                    self._recalibrate(budgets, name)
            kept = [name for name in self.norms if self._is_part(budgets, name)]
            mask.swap(self.model, norms.moved(self.model, kept, self.signals.held, self.settings.ranks))
            distances = with_less(lambda: self.trained.distances(self.signals), self.less, self.settings.ranks)
        sizes, parameters = self.trained.sizes, dict(self.model.named_parameters())
        reports = (replace(a.report, discrepancy=distances[n] / (sizes[n] or 1.0)) for n, a in answers.items())
        errors = {name: answer.error for name, answer in answers.items()}
        return TrimResult(
            reports=tuple(reports),
            skipped=self.todo.skipped,
            masks={name: parameters[name].detach() != 0 for name in self.prunable},
            sparsity=mask.sparsity({name: parameters[name] for name in self.prunable}),
            model_sparsity=mask.sparsity(parameters),
            discrepancy=distances[self.last],
            discrepancy_bound=discrepancy_bound(errors, pruned, self.todo) if chained else None,
            response_norm=sizes[self.last],
            seconds=time.perf_counter() - start,
            notes=tuple(self.notes),
        )

    def attempt(self, name: str, wanted: Budget) -> Answer:
        """One layer of the trained network, on its own; the model stays as it is."""
        with evaluating(self.model):
            return self._answer(name, wanted, None, False)

    def _answer(self, name: str, wanted: Budget, before: str | None, chained: bool) -> Answer:
        """Record what a layer sees now, solve for it and judge the answer; the model stays as it is.

        Args:
            name: of the layer.
            wanted: its budget.
            before: the layer pruned before it.
            chained: whether the layers so far are a plain chain, for which errors are known to add up.
        """
        began = time.perf_counter()
        if self.meter is not None:
            self.meter.lap()
        source = before if chained else None
        sources, fed = [] if source is None else [source], False
        tapes = self.signals.tapes(*sources, name, inputs=[name], outputs=sources)
        self.trained.expect_calls(name, tapes[name].rows if name in tapes else 0, self.settings.ranks)
        if source is not None:
            fed = self.signals.feeds(source, tapes.pop(source), tapes[name])
        trained_signal = self.settings.scheme == "parallel" or before is None
        problem = self.pose(name, tapes.pop(name), wanted, trained_signal)
        release()  # the holes that the recording has left do not fit what a solve needs
        solution, W, values, fallback = self._solve(name, problem, wanted, trained_signal)
        error = 0.0
        if chained and before is None:
            fed, error = True, self.length(problem.response(W) - problem.Y)
        elif fed and before is not None:
            signal = self.folds[name].rows(self.trained[before][0])
            error = self.length(replace(problem, X=signal).response(W) - problem.Y)
        memory = None if self.meter is None else self.meter.lap() / GIB
        layer = self.todo.layers[name]
        report = row(layer, problem, solution, W, self._zeros(layer, values), time.perf_counter() - began)
        return Answer(values, replace(report, fallback=fallback, memory=memory), error, fed)

    def _known(self, name: str, cause: str) -> Answer | None:
        """A layer's answer in the journal."""
        entry = None if self.journal is None else self.journal.read(name, cause)
        if entry is None:
            return None
        values, facts = entry
        report = LayerReport(**{**facts["report"], "shape": tuple(facts["report"]["shape"])})
        device = next(self.model.parameters()).device
        return Answer({key: value.to(device) for key, value in values.items()}, report, facts["error"], facts["fed"])

    def _remember(self, name: str, cause: str, answer: Answer) -> None:
        if self.journal is not None:
            facts = {"report": asdict(answer.report), "error": answer.error, "fed": answer.fed}
            self.journal.write(name, cause, answer.values, facts)

    def pose(self, name: str, tape: Tape, wanted: Budget, trained_signal: bool) -> LayerProblem:
        """One layer's program on what was recorded."""
        X, offset = self.signals.inputs(name, tape), self.signals.offset(name, tape)
        convex = self.method.of(wanted).convex
        ranks = self.settings.ranks
        return pose(self.folds[name], X, self.trained[name], offset, wanted, convex, trained_signal, ranks)

    def length(self, R: Tensor) -> float:
        """‖R‖ of the rows of all processes."""
        return length(R, self.settings.ranks)

    def _solve(
        self, name: str, problem: LayerProblem, wanted: Budget, trained_signal: bool
    ) -> tuple[Solution, Tensor, dict[str, Tensor], str]:
        """The solution, its folded weights after the refit, them as parameters, and what was done if it failed."""
        dense = Solution.uncertified(problem.W), problem.W, self.trained_values(name)
        if wanted.sparsity == 0:
            return *dense, ""
        fold, status = self.folds[name], Status.NONFINITE
        try:
            solution, W, values = self.method.solve(name, fold, problem, wanted, trained_signal)
            status, failed = Status(int(solution.status.amax())), failure(problem, solution, W)
        except torch.linalg.LinAlgError as error:
            failed = f"the solve failed: {error}"
        if not failed:
            return solution, W, values, ""
        if self.settings.on_failure == "magnitude":
            simple = Method(Magnitude(), self.settings.penalize_bias)
            solution, W, values = simple.solve(name, fold, problem, wanted, trained_signal)
            if not failure(problem, solution, W):
                solution = replace(solution, status=torch.full_like(solution.status, int(status)))
                return solution, W, values, f"by magnitude and refit, for {failed}"
        return (
            replace(dense[0], status=torch.full_like(dense[0].status, int(status))),
            *dense[1:],
            f"left dense, for {failed}",
        )

    def _recalibrate(self, budgets: Mapping[str, Budget], layer: str) -> None:
        """Re-estimate, one by one, the BatchNorms that run next after a layer and are no part of a solution."""
        for name in self.norms:
            if self.todo.norms[name] == layer and not self._is_part(budgets, name):
                mask.swap(self.model, norms.reestimated(self.model, name, self.signals.held, self.settings.ranks))

    def _is_part(self, budgets: Mapping[str, Budget], norm: str) -> bool:
        """Whether a layer was solved behind a BatchNorm, whose answers are right then and have to stay."""
        return any(
            flow.norm == norm and (self.method.of(budgets[name]).behind or budgets[name].refit)
            for name, flow in self.todo.flows.items()
        )

    def _plain(self, name: str) -> bool:
        """Whether a layer is a matrix and a ReLU at most, for which errors are known to add up."""
        flow = self.todo.flows[name]
        relu = flow.rectifier is None or flow.rectifier.same(Rectifier())
        return isinstance(self.todo.layers[name], Linear) and flow.norm is None and not flow.sums and relu

    def _zeros(self, layer: Layer, values: Mapping[str, Tensor]) -> int:
        """Exact zeros among the prunable values of a layer, in its own precision."""
        own = layer.names(self.settings.penalize_bias)
        return sum(int((values[key].to(layer.parameter.dtype) == 0).sum()) for key in own)


def _work(layer: Layer) -> float:
    """What a layer costs, about, in relation to others: a pass over the inputs, the Gram matrix, the steps."""
    N, M = layer.inputs, layer.outputs
    return 1e8 + layer.groups * (1e3 * N * N + 10.0 * N**3 + 1e3 * N * M)


def failure(problem: LayerProblem, solution: Solution, W: Tensor) -> str:
    """Why an answer cannot be used; empty if it can.

    One that did not converge can, as long as it answers within its radius.
    """
    status = Status(int(solution.status.amax()))
    if status in (Status.NONFINITE, Status.INFEASIBLE):
        return f"the solve ended {status.name}"
    if not bool(W.isfinite().all()):
        return "the solve answered NaN or Inf"
    if status == Status.MAX_STEPS and bool(solution.epsilon.isfinite().all()):
        far, radius = length(problem.distance(W)), length(solution.epsilon)
        if far > 1.01 * radius:
            return f"the solve did not converge: it answers {far / radius:.2f} times its radius away"
    return ""
