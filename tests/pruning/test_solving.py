"""The solve of a layer: methods at an epsilon, importance of neurons, refit, and fallbacks of a failed solve."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from networks import conv2d_inputs, conv2d_network, mlp, mlp_batches, wide_mlp
from torch import nn

from lightning_nettrim import ADMM, Cardinality, LayerProblem, Magnitude, Solution, SparseGPT, Status, Wanda, trim


@pytest.mark.parametrize("solver", [None, Magnitude(), Wanda(), SparseGPT()], ids=repr)
def test_methods_that_take_a_sparsity_prune_to_an_epsilon_too(solver):
    data = mlp_batches()
    result = trim(wide_mlp(), data, epsilon=0.1, scheme="parallel", solver=solver or Cardinality())
    assert all(0 < report.local_error <= 0.1 for report in result.reports)
    if solver is None:
        convex = trim(wide_mlp(), data, epsilon=0.1, scheme="parallel")
        assert result.sparsity > convex.sparsity


def test_the_fewest_weights_within_an_epsilon_can_have_a_pattern():
    model = mlp()
    trim(model, mlp_batches(), epsilon=0.2, solver=Cardinality(), pattern="per_neuron", targets=["0"])
    kept = (model[0].weight != 0).sum(1)
    assert 0 < int(kept[0]) < 20
    assert (kept == kept[0]).all()


class Chain(nn.Module):
    """Three Linear layers, of which the second reads the first; the later half of its inputs has small weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(20, 30), nn.Linear(30, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.b.weight[:, 15:] *= 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(self.a(x).relu())))


def test_neurons_are_weighted_by_the_weights_that_read_them():
    model, equal = Chain(), Chain()
    trim(model, mlp_batches(), sparsity=0.7, allocate="uniform")
    kept = (model.a.weight != 0).sum(1).float()
    assert kept[:15].mean() > 2 * kept[15:].mean()
    trim(equal, mlp_batches(), sparsity=0.7, allocate="uniform", importance="equal")
    kept = (equal.a.weight != 0).sum(1).float()
    assert kept[:15].mean() < 1.5 * kept[15:].mean()


def test_the_refit_reduces_every_local_error():
    errors = {}
    for refit in (True, False):
        result = trim(mlp(), mlp_batches(), epsilon=0.15, scheme="parallel", refit=refit)
        errors[refit] = [report.local_error for report in result.reports]
        assert all(report.sparsity > 0 for report in result.reports)
    assert all(refitted < solved for refitted, solved in zip(errors[True], errors[False], strict=True))


def test_dead_neurons_and_dead_inputs():
    model, data = mlp(), mlp_batches()
    with torch.no_grad():
        model[0].bias[:5] = -100
        model[2].bias[:] = -100
        for batch in data:
            batch[:, :4] = 0
    result = trim(model, data, epsilon=0.1)
    assert [report.status for report in result.reports] == ["CONVERGED"] * 3
    assert int(model[0].weight[:5].count_nonzero()) == 0
    assert int(model[0].weight[:, :4].count_nonzero()) == 0
    assert int(model[2].weight.count_nonzero()) == 0


# --- failed solves


def spoil(solution: Solution, failure: str) -> Solution:
    """A solution as after a failure of the solver."""
    if failure == "nan":
        return replace(solution, W=torch.full_like(solution.W, torch.nan))
    ended = torch.full_like(solution.status, int(Status.MAX_STEPS))
    return replace(solution, W=torch.zeros_like(solution.W), status=ended)


@dataclass(frozen=True)
class Failing:
    """Mixin of a solver that fails in the layer with 20 outputs."""

    failure: str = "nan"

    def solve(self, problem: LayerProblem, warm=None) -> Solution:
        if problem.W.shape[-1] == 20 and self.failure == "linalg":
            raise torch.linalg.LinAlgError("no convergence")
        solution = super().solve(problem, warm)
        return spoil(solution, self.failure) if problem.W.shape[-1] == 20 else solution


@dataclass(frozen=True)
class FailingCardinality(Failing, Cardinality):
    """Cardinality that fails in one layer."""


@dataclass(frozen=True)
class FailingADMM(Failing, ADMM):
    """ADMM that fails in one layer."""


REASONS = {
    "nan": "the solution has NaN or Inf",
    "linalg": "the solve failed: no convergence",
    "unconverged": "the solve did not converge: the distance of the response is",
}


@pytest.mark.parametrize(
    ("budget", "solver"),
    [
        ({"sparsity": 0.7}, FailingCardinality(failure="nan")),
        ({"sparsity": 0.7}, FailingCardinality(failure="linalg")),
        ({"epsilon": 0.2}, FailingADMM(failure="nan")),
        ({"epsilon": 0.2}, FailingADMM(failure="linalg")),
        ({"epsilon": 0.2}, FailingADMM(failure="unconverged")),
    ],
    ids=lambda value: getattr(value, "failure", str(value)),
)
@pytest.mark.parametrize("on_failure", ["magnitude", "dense"])
def test_a_failed_solve_falls_back(budget, solver, on_failure):
    trained, model = conv2d_network(), conv2d_network()
    result = trim(
        model, conv2d_inputs().split(100), **budget, solver=solver, on_failure=on_failure, importance="equal",
        allocate="uniform", refit=False, num_samples=1000, max_rows=1000,
    )  # fmt: skip
    (report,) = [row for row in result.reports if row.fallback]
    assert report.name == "4"
    assert report.fallback in result.table()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    weight = model[4].weight
    assert f"because {REASONS[solver.failure]}" in report.fallback
    if on_failure == "dense":
        assert report.fallback.startswith("left dense, ")
        assert torch.equal(weight, trained[4].weight)
    else:
        assert report.fallback.startswith("pruned by magnitude and refitted, ")
        kept = weight != 0
        assert kept.sum() < weight.numel()
        assert trained[4].weight[kept].abs().min() >= trained[4].weight[~kept].abs().max()
    others = [row for row in result.reports if row.name != "4"]
    assert all(row.zeros > 0 for row in others)
