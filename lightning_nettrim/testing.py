"""Reusable tests for extensions: subclass `SolverContract` in a pytest module to test a solver."""

from __future__ import annotations

import dataclasses
import pickle
from typing import ClassVar

import torch
from torch import Tensor

from lightning_nettrim.core.certificate import violation
from lightning_nettrim.core.pattern import parse_pattern
from lightning_nettrim.core.problem import TENSORS, LayerProblem
from lightning_nettrim.solvers import Solution, Solver, Status, solve


class SolverContract:
    """Tests that every solver must pass.

    A subclass whose name begins with ``Test`` sets ``solver``; pytest collects the tests.

    Attributes:
        solver: an instance of the solver.
        patterns: names of the patterns it supports.
        rtol: relative tolerance when equal computations are compared.

    Examples:
        >>> class TestMagnitude(SolverContract):
        ...     solver = Magnitude()
    """

    solver: ClassVar[Solver]
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "per_neuron", "2:4", "neuron", "2x4")
    rtol: ClassVar[float] = 1e-6

    def problem(
        self, *, relu: bool = True, batch: int = 1, sparsity: float | None = 0.5, epsilon: float | None = None
    ) -> LayerProblem:
        """Random problems with 96 samples, 8 inputs, a free bias and 6 outputs, in float64.

        Args:
            relu: whether a ReLU follows.
            batch: number of problems.
            sparsity: fraction of zeros; ``None`` for a problem with an epsilon.
            epsilon: relative to ‖Y‖.
        """
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(batch, 8, 8, generator=generator, dtype=torch.float64)
        X = torch.randn(batch, 96, 8, generator=generator, dtype=torch.float64) @ mixing
        X = torch.cat([X, torch.ones_like(X[..., :1])], -1)
        W = torch.randn(batch, 9, 6, generator=generator, dtype=torch.float64)
        Y = X @ W
        Omega = Y > 0 if relu else None
        Y = Y.clamp(min=0) if relu else Y
        radius = None if epsilon is None else epsilon * torch.linalg.matrix_norm(Y)
        penalty = torch.tensor([1.0] * 8 + [0.0], dtype=torch.float64)
        return LayerProblem(X, Y, W, epsilon=radius, Omega=Omega, penalty=penalty, sparsity=sparsity)

    def test_is_a_frozen_dataclass_of_plain_values(self) -> None:
        """YAML can define it, and it can be pickled."""
        solver = self.solver
        assert dataclasses.is_dataclass(solver)
        for field in dataclasses.fields(solver):
            value = getattr(solver, field.name)
            assert value is None or isinstance(value, int | float | str | bool), f"{field.name}: {value!r}"
        assert dataclasses.replace(solver) == solver
        assert pickle.loads(pickle.dumps(solver)) == solver

    def test_zeros_are_exact_in_every_pattern(self) -> None:
        """The pattern and the number of zeros are exact, and the weights are finite."""
        for name in self.patterns:
            pattern = parse_pattern(name)
            for relu in (True, False):
                problem = dataclasses.replace(
                    self.problem(relu=relu, batch=2), sparsity=pattern.sparsity or 0.5, pattern=pattern
                )
                solution = solve(problem, self.solver)
                assert solution.W.shape == problem.W.shape
                assert bool(solution.W.isfinite().all())
                for W in solution.W:
                    kept = pattern.to_blocks((W[:-1] != 0).double().unsqueeze(0)).amax(-1).sum(-1)
                    assert bool((kept <= problem.kept_blocks).all()), f"{name}: too many blocks are kept"
                    assert int((W[:-1] != 0).sum()) == problem.nonzeros, f"{name}: not exactly at the sparsity"

    def test_the_problem_is_not_changed(self) -> None:
        """The tensors of the problem are as before."""
        problem = self.problem()
        before = {name: t.clone() for name in TENSORS if (t := getattr(problem, name)) is not None}
        solve(problem, self.solver)
        assert all(torch.equal(getattr(problem, name), value) for name, value in before.items())

    def test_it_is_deterministic(self) -> None:
        """Two solves of a problem give the same weights, to the bit."""
        one, other = (solve(self.problem(), self.solver).W for _ in range(2))
        assert torch.equal(one, other)

    def test_a_batch_equals_its_problems_alone(self) -> None:
        """The problems of a batch do not influence each other."""
        batch = self.problem(batch=3)
        together = solve(batch, self.solver).W
        for i in range(3):
            alone = solve(self._select(batch, i), self.solver).W
            torch.testing.assert_close(together[i : i + 1], alone, rtol=self.rtol, atol=self.rtol)

    def test_dead_inputs_and_outputs(self) -> None:
        """Inputs and responses that are always zero give finite weights."""
        problem = self.problem(batch=2)
        X, Y = problem.X.clone(), problem.Y.clone()
        X[..., 0], Y[..., 0] = 0, 0
        problem = dataclasses.replace(problem, X=X, Y=Y, Omega=Y > 0)
        assert bool(solve(problem, self.solver).W.isfinite().all())

    def test_the_status_says_whether_there_is_a_certificate(self) -> None:
        """Certified solutions have a status and a gap; others have neither."""
        solution = solve(self.problem(), self.solver)
        if not self.solver.certifies:
            assert solution.status is None
            assert bool(solution.gap.isnan().all())
            return
        self._check_certificate(solution)

    def test_an_epsilon_is_respected(self) -> None:
        """A converged solution of a problem with an epsilon is feasible, and no denser than the trained weights."""
        if not self.solver.takes_epsilon:
            return
        problem = self.problem(sparsity=None, epsilon=0.1)
        solution = solve(problem, self.solver)
        self._check_certificate(solution)
        if solution.status is not None and bool((solution.status == Status.CONVERGED).all()):
            assert bool((violation(problem, solution.W) <= 1e-2).all())
            assert bool((problem.objective(solution.W) <= problem.objective(problem.W) * (1 + 1e-6)).all())

    def test_a_reusable_state_changes_nothing(self) -> None:
        """A state that depends on the inputs only gives the same solution at another sparsity."""
        if not self.solver.state_depends_on_inputs_only:
            return
        problem = self.problem()
        state = solve(problem, self.solver).state
        other = dataclasses.replace(problem, sparsity=0.75)
        warm, cold = solve(other, self.solver, state).W, solve(other, self.solver).W
        torch.testing.assert_close(warm, cold, rtol=self.rtol, atol=self.rtol)

    def _select(self, problem: LayerProblem, i: int) -> LayerProblem:
        return problem.subset(torch.tensor([i]))

    def _check_certificate(self, solution: Solution) -> None:
        status, gap, bound, objective = solution.status, solution.gap, solution.bound, solution.objective
        assert isinstance(status, Tensor)
        assert {int(value) for value in status} <= {int(value) for value in Status}
        converged = status == Status.CONVERGED
        assert bool((gap[converged] <= 1e-2).all())
        assert bool((bound[converged] <= objective[converged] * (1 + 1e-2)).all())
