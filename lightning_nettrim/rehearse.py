"""Rehearse: what pruning some layers would do to the network, and the budgets that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lightning_nettrim import allocate, mask
from lightning_nettrim.allocate import Bounds, Curve
from lightning_nettrim.digest import digest
from lightning_nettrim.memory import with_less
from lightning_nettrim.outcome import relative_error
from lightning_nettrim.plan import Budget
from lightning_nettrim.prune import Pruner
from lightning_nettrim.replay import evaluating
from lightning_nettrim.signals import Signals
from lightning_nettrim.solvers import Cardinality, refit

PROBE = 1024
"""Inputs, about, on which the effect of a layer on the network is measured."""

REHEARSAL = 2048
"""Inputs, about, on which an allocation is rehearsed."""

QUICK = Cardinality(steps=30, parts=4)
"""By which a layer's curve is measured."""

DENSITIES = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5)
"""At which a layer's curve is measured."""

COMPENSATION = 1.0
"""Tilt of the ``global`` allocation in a cascade; measured on LeNet-300-100 at 95, 97 and 98 % zeros."""


class Rehearsal:
    """What a pruner would do at other budgets, by quick solves; the model has its trained weights again afterwards.

    Args:
        pruner: of the trained model.
        progress: called with what is being done and which fraction of it is.
    """

    def __init__(self, pruner: Pruner, progress: Callable[[str, float], None] | None = None) -> None:
        self.pruner, self._progress = pruner, progress or (lambda doing, fraction: None)
        self._curves: dict[str, Curve] = {}
        self._stage: Pruner | None = None
        self._trained: tuple[Signals, Tensor] | None = None  # by which the probe's last layer answered what

    def budgets(self, how: str, sparsity: float | None) -> dict[str, Budget]:
        """The budget of every layer, the common sparsity spread over those that share it.

        Args:
            how: ``"uniform"``, ``"epsilon"``, ``"global"`` or ``"magnitude"``.
            sparsity: of those together; ``None`` is none to be spread.

        Raises:
            ValueError: if the layers' bounds leave no such budgets.
        """
        sizes, bounds = self.room()
        if sparsity is None or not sizes:
            return self.pruner.todo.budgets
        total = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
        if how == "uniform":
            kept = allocate.uniform(sizes, total, bounds)
        elif how == "magnitude":
            kept = self._by_magnitude(sizes, total, bounds)
        elif how == "epsilon":
            kept = allocate.common_error(self.curves(list(sizes)), total, bounds)
        else:
            return self._best(self._candidates(sizes, total, bounds))
        return self._with(sizes, kept)

    def room(self) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
        """Of each layer that shares the common sparsity: its prunable weights, and how many of them may be kept."""
        own, all_sizes = self.pruner.todo.budgets, self.pruner.sizes()
        sizes = {name: all_sizes[name] for name in self.pruner.todo.shared if own[name].epsilon is None}
        bounds = {}
        for name, size in sizes.items():
            least, most = (size - round(limit * size) for limit in (own[name].max_sparsity, own[name].min_sparsity))
            bounds[name] = max(least, 1), most
        return sizes, bounds

    def discrepancy(self, budgets: Mapping[str, Budget]) -> float:
        """How much the network's output changes at these budgets, by a quick `Cardinality` on part of the inputs."""
        self.pruner.doing = "rehearsing an allocation"
        if self._stage is None:
            self._stage = self.pruner.smaller(REHEARSAL, QUICK)

        def progress(_: str, fraction: float) -> None:
            self._progress("rehearsing an allocation", fraction)

        try:
            return self._stage.prune(budgets, progress=progress).discrepancy
        finally:
            self.pruner.restore()

    def curves(self, names: Sequence[str]) -> dict[str, Curve]:
        """What it costs to prune each of these layers alone, in its pattern, by a quick `Cardinality` and refit."""
        pruner = self.pruner
        missing = [name for name in names if name not in self._curves]
        with evaluating(pruner.model):
            pruner.restore()
            for i, name in enumerate(missing):
                pruner.doing = f"measuring the curve of {name}"
                self._progress("measuring what a layer's zeros cost", i / len(missing))
                measured = self._remembered(
                    f"curve-{name}", repr(pruner.todo.budgets[name]), partial(self._curve, name)
                )
                self._curves[name] = Curve(*map(tuple, measured))
                pruner.restore()
        return {name: self._curves[name] for name in names}

    def _remembered(self, name: str, about: str, compute: Callable[[], Any]) -> Any:
        """What the journal holds, or what is computed now, with less where memory does not suffice."""
        journal, cause = self.pruner.journal, digest(self.pruner.cause, about)
        entry = None if journal is None else journal.read(name, cause)
        if entry is not None:
            return entry[1]
        found = with_less(compute, self.pruner.less, self.pruner.settings.ranks)
        if journal is not None:
            journal.write(name, cause, {}, found)
        return found

    def _curve(self, name: str) -> tuple[list[int], list[float], list[float]]:
        """The columns of one layer's curve; the model is left with it pruned."""
        pruner, last = self.pruner, self.pruner.last
        pruner.restore()
        probe = pruner.signals.probe(PROBE)
        if self._trained is None or self._trained[0] is not pruner.signals:
            self._trained = pruner.signals, probe.answers(last)[last]
        trained = self._trained[1]
        size = pruner.length(trained) or 1.0
        fold, asked = pruner.folds[name], replace(pruner.todo.budgets[name], epsilon=None)
        posed = pruner.pose(name, pruner.signals.tapes(name, outputs=()).pop(name), asked, True)
        spectrum, points = pruner.method.spectra.get(name, fold.W.device), {}
        for density in DENSITIES:
            problem = replace(posed, sparsity=1 - density)
            if not problem.nonzeros:
                continue
            solution = pruner.method.weighed(name, problem, QUICK, spectrum)
            spectrum = solution.state
            W = refit(problem, solution.W, steps=2, inner=8)
            mask.swap(pruner.model, fold.parameters(W))
            effect = pruner.length(probe.answers(last)[last] - trained) / size
            points[problem.nonzeros] = relative_error(problem, W), effect
        if pruner.settings.scheme == "parallel" or name == next(iter(pruner.todo.layers)):
            pruner.method.spectra.put(name, spectrum)
        points[pruner.sizes()[name]] = 0.0, 0.0
        errors, effects = zip(*points.values(), strict=True)
        return [*points], [*errors], [*effects]

    def _best(self, candidates: Iterator[dict[str, Budget]]) -> dict[str, Budget]:
        """Those budgets that change the network's output least in a rehearsal."""

        def judged(budgets: dict[str, Budget]) -> float:
            about = repr(sorted(budgets.items()))
            return self._remembered(f"rehearsal-{digest(about)[:8]}", about, lambda: self.discrepancy(budgets))

        return min(candidates, key=judged)

    def _candidates(self, sizes: Mapping[str, int], total: int, bounds: Bounds) -> Iterator[dict[str, Budget]]:
        """By marginal effect, which takes layers one at a time; by magnitude; and halfway.

        Layers of a residual block that can each be spared, but not together, are what the first of them is wrong about.
        """
        tilt = COMPENSATION if self.pruner.settings.scheme == "cascade" else 0.0
        by_effect = allocate.marginal_error(self.curves(list(sizes)), total, bounds, tilt)
        by_size = self._by_magnitude(sizes, total, bounds)
        for kept in (by_effect, by_size, allocate.halfway(by_effect, by_size, total, bounds)):
            yield self._with(sizes, kept)

    def _by_magnitude(self, sizes: Mapping[str, int], total: int, bounds: Bounds) -> dict[str, int]:
        weights = self.pruner.weights()
        return allocate.by_magnitude({name: weights[name] for name in sizes}, total, bounds)

    def _with(self, sizes: Mapping[str, int], kept: Mapping[str, int]) -> dict[str, Budget]:
        own = self.pruner.todo.budgets
        return own | {name: replace(own[name], sparsity=1 - kept[name] / size) for name, size in sizes.items()}
