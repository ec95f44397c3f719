"""Method: which solver answers a layer's budget, on what, and with which refit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_nettrim.fold import Fold
from lightning_nettrim.plan import Budget
from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.shelf import Kept, Shelf
from lightning_nettrim.solvers import ADMM, Cardinality, Solution, Solver, fewest, refit, solve
from lightning_nettrim.solvers.cardinality import Spectrum


class Spectra:
    """What `Cardinality` knows of the inputs of layers that always see the same, until it serves again.

    Args:
        shelf: where it waits; where it comes from, if not given.
    """

    def __init__(self, shelf: Shelf | None = None) -> None:
        self._shelf = shelf or Shelf("device")
        self._kept: dict[str, Kept] = {}

    def get(self, name: str, device: torch.device) -> Spectrum | None:
        """A layer's, on a device; ``None`` if it is not known."""
        kept = self._kept.get(name)
        return None if kept is None else Spectrum(*(part.to(device) for part in kept.load()))

    def put(self, name: str, spectrum: Spectrum | None) -> None:
        """Keep a layer's, if there is one and it is not known yet."""
        if spectrum is not None and name not in self._kept:
            self._kept[name] = self._shelf.put(spectrum)

    def clear(self) -> None:
        """Let all of them go."""
        self._kept.clear()


@dataclass(frozen=True, eq=False)
class Method:
    """A solver and how it is asked.

    Args:
        solver: ``None`` is `Cardinality` for a sparsity and `ADMM` for an epsilon.
        penalize_bias: biases are pruned like weights.
        reading: ``{name: (groups, 1, M)}`` what a neuron's error counts, of the layers where it is not one.
        spectra: of the layers whose inputs stay as they are, once they are known.
    """

    solver: Solver | None
    penalize_bias: bool
    reading: Mapping[str, Tensor] = field(default_factory=dict)
    spectra: Spectra = field(default_factory=Spectra)

    def of(self, wanted: Budget) -> Solver:
        """The solver for a budget."""
        return chosen(self.solver, wanted.epsilon)

    def solve(
        self, name: str, fold: Fold, problem: LayerProblem, wanted: Budget, trained_signal: bool
    ) -> tuple[Solution, Tensor, dict[str, Tensor]]:
        """The solution, its folded weights after the refit towards the trained responses, and them as parameters."""
        solver = self.of(wanted)
        if not solver.behind and wanted.epsilon is None:
            solution = solve(self._own(fold, problem), solver)
            values = fold.layer.parameters(solution.W)
            solution = replace(solution, W=fold.fold(solution.W))
            if not wanted.refit:
                return solution, solution.W, values
        elif wanted.epsilon is not None and not solver.convex:
            solution = fewest(problem, solver, wanted.refit)
        elif trained_signal and isinstance(solver, Cardinality):
            solution = self.weighed(name, problem, solver, self.spectra.get(name, problem.W.device))
            self.spectra.put(name, solution.state)
        else:
            solution = self.weighed(name, problem, solver)
        if not wanted.refit:
            return solution, solution.W, fold.parameters(solution.W)
        effort: dict[str, Any] = {} if solver.convex else {"inner": 10, "rtol": 3e-3}
        W = refit(replace(problem, V=None), solution.W, **effort)
        return solution, W, fold.parameters(W)

    def weighed(self, name: str, problem: LayerProblem, solver: Solver, warm: Any = None) -> Solution:
        """Solve, with each neuron's error counted as what follows reads it: the ReLU commutes with positive factors."""
        factor = self.reading.get(name)
        bounded = problem.Omega is not None and (problem.rectifier.low != 0 or problem.bounded)
        if factor is None or bounded or not isinstance(solver, Cardinality):
            return solve(problem, solver, warm)
        offset = None if problem.offset is None else problem.offset * factor
        solution = solve(replace(problem, Y=problem.Y * factor, W=problem.W * factor, offset=offset), solver, warm)
        return replace(solution, W=solution.W / factor)

    def _own(self, fold: Fold, problem: LayerProblem) -> LayerProblem:
        """The same program for a layer's own weights, before anything that follows it."""
        free = fold.layer.bias is not None and not self.penalize_bias
        X = problem.X[..., : fold.W.shape[1]]
        return replace(problem, X=X, W=fold.W, penalty=fold.layer.penalty(X) if free else None)


def chosen(solver: Solver | None, epsilon: float | None) -> Solver:
    """The solver that was asked for; else `Cardinality` or, at a radius, `ADMM`."""
    return solver or (Cardinality() if epsilon is None else ADMM())
