"""Trim: record, solve and swap, for any torch module; Lightning is not needed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_nettrim import mask
from lightning_nettrim.capture import Flow, Tape, evaluating, record
from lightning_nettrim.layers import matrix, parameters_of, refuse_unusable, solve_dtype, with_bias
from lightning_nettrim.plan import Budget, Plan, check_arguments, plan
from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.report import LayerReport, TrimResult
from lightning_nettrim.sample import Inputs, hold
from lightning_nettrim.solvers import ADMM, Solution, Solver, Status, refit, solve

log = logging.getLogger(__name__)

GAMMA = 1.1
"""Slack γ of the cascade's ball, ε² ≥ γ‖(XW − Y)_Ω‖², which keeps the trained weights feasible [Aghasi et al. 2020]."""


def trim(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    epsilon: float | None = None,
    sparsity: float | None = None,
    scheme: Literal["cascade", "parallel"] = "cascade",
    solver: Solver | None = None,
    refit: bool = True,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    per_layer: Mapping[str, Mapping[str, float | bool]] | None = None,
    num_samples: int = 8192,
    seed: int = 0,
    penalize_bias: bool = False,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> TrimResult:
    """Prune a trained model in place, without retraining it.

    Each layer gets the sparsest weights that answer as the trained layer did, after its ReLU, on a sample of what it
    sees. Whatever interrupts this, an error or Ctrl-C, leaves every layer as it was trained.

    Args:
        model: a trained module; its parameters are changed in place, nothing else about it is.
        batches: an iterable of inputs or of (input, target, …), read once.
        epsilon: largest change of a layer's response, relative: 0.05 is 5 % of ‖Y‖. The zeros follow from it.
        sparsity: fraction of zeros in each layer, exact to the weight. The change follows from it.
        scheme: ``"cascade"`` solves layer after layer on the pruned network's signals, so that a layer makes up for the
            ones before it; ``"parallel"`` solves every layer on the trained network's signals.
        solver: the method; ``None`` is `ADMM`, the convex program.
        refit: refit the weights on their support, which removes the shrinkage of the ℓ1 norm.
        targets: layers to prune: names, globs, ``re:`` patterns or class names; ``None`` is every Linear.
        ignore: layers to leave alone, by the same keys.
        per_layer: ``{key: {"epsilon" | "sparsity" | "refit": value}}``, in place of the common ones.
        num_samples: inputs, and rows per layer, to calibrate on at most; a uniform sample of the whole pass.
        seed: of that sample.
        penalize_bias: let biases be pruned like weights, the paper's way.
        on_layer: called with the report of each layer as it is finished; its ``discrepancy`` is still NaN.

    Returns:
        The reports, masks and totals.

    Raises:
        ValueError: for arguments, models and batches that cannot be used; the model is untouched.

    References:
        Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Sci. 2020.
    """
    start = time.perf_counter()
    common = check_arguments(epsilon, sparsity, scheme, num_samples, per_layer, refit)
    refuse_unusable(model)
    held = hold(model, batches, num_samples, seed)
    todo = plan(model, held, common, targets, ignore, per_layer)
    solver = ADMM() if solver is None else solver
    original = {name: matrix(layer) for name, layer in todo.layers.items()}
    names = [name for layer, W in original.items() for name in parameters_of(layer, todo.layers[layer], W)]
    reports: list[LayerReport] = []
    pruned: dict[str, Tensor] = {}
    errors: dict[str, float] = {}  # of each layer alone, on the trained signals
    chained, before = True, None
    current = "recording the trained responses"
    try:
        with mask.restored_on_error(model, names), evaluating(model):
            trained = _responses(model, todo, held, num_samples, seed)
            for name, layer in todo.layers.items():
                current, began = name, time.perf_counter()
                tapes = _signals(model, todo, held, before, name, num_samples, seed)
                X, Y = with_bias(layer, _finite(name, tapes[name].X)), trained[name]
                problem = pose(todo, name, X, Y, original[name], scheme == "parallel" or before is None, penalize_bias)
                solution, W = prune(problem, solver, todo.budgets[name])
                pruned |= parameters_of(name, layer, W)
                if scheme == "cascade":
                    mask.swap(model, parameters_of(name, layer, W))
                chained &= before is None or _feeds(before, todo.flows[before], tapes[before], tapes[name])
                signal = X if before is None else with_bias(layer, trained[before]) if chained else None
                if signal is not None:
                    alone = replace(problem, X=signal)
                    errors[name] = _length(alone.response(W) - Y)
                reports.append(_report(name, layer, problem, solution, W, time.perf_counter() - began))
                if on_layer is not None:
                    on_layer(reports[-1])
                before = name
            current = "measuring the pruned network"
            mask.swap(model, pruned)
            answers = _responses(model, todo, held, num_samples, seed)
    except BaseException as error:
        log.warning(
            "%s while solving %s: all of %s have their trained weights again",
            type(error).__name__, current, ", ".join(todo.layers),
        )  # fmt: skip
        raise
    distances = {name: _length(answers[name] - trained[name]) for name in answers}
    norms = {name: _length(trained[name]) for name in trained}
    parameters = dict(model.named_parameters())
    prunable_names = [name for name in names if penalize_bias or name.endswith("weight")]
    last = next(reversed(todo.layers))
    return TrimResult(
        reports=tuple(replace(r, discrepancy=distances[r.name] / (norms[r.name] or 1.0)) for r in reports),
        skipped=todo.skipped,
        masks={name: parameters[name].detach() != 0 for name in prunable_names},
        sparsity=mask.sparsity({name: parameters[name] for name in prunable_names}),
        model_sparsity=mask.sparsity(parameters),
        discrepancy=distances[last],
        discrepancy_bound=_discrepancy_bound(errors, pruned, todo) if chained else None,
        response_norm=norms[last],
        seconds=time.perf_counter() - start,
    )


def pose(
    todo: Plan, name: str, X: Tensor, Y: Tensor, W: Tensor, trained_signal: bool, penalize_bias: bool
) -> LayerProblem:
    """One layer's program: parallel on the trained signal, else the cascade's, of which W stays feasible.

    The cascade asks ε² ≥ γ‖(XW − Y)_Ω‖² and takes V = max(XW, 0) for its ceiling: what is below zero off Ω is zero
    after the ReLU, so the paper's V = XW would only forbid answers that are as good.
    """
    layer, wanted = todo.layers[name], todo.budgets[name]
    XW = X @ W
    problem = LayerProblem(X, Y, W, sparsity=wanted.sparsity, Omega=Y > 0 if todo.flows[name].relu else None)
    missed = torch.linalg.matrix_norm(problem.on_Omega(XW - Y)) * GAMMA**0.5
    norm = torch.linalg.matrix_norm(Y)
    radius = (wanted.epsilon or 1e-3) * torch.where(norm > 0, norm, 1)
    ceiling = None if trained_signal or problem.Omega is None else XW.clamp(min=0)
    free = layer.bias is not None and not penalize_bias
    penalty = torch.cat([X.new_ones(layer.in_features), X.new_zeros(1)]) if free else None
    return replace(problem, epsilon=torch.maximum(radius, missed), V=ceiling, penalty=penalty)


def prune(problem: LayerProblem, solver: Solver, wanted: Budget) -> tuple[Solution, Tensor]:
    """The solution, and its weights after the refit towards the trained responses themselves."""
    if wanted.sparsity == 0:
        none = problem.X.new_full((), torch.nan)
        zero = torch.zeros((), dtype=torch.long)
        return Solution(problem.W, zero + Status.CONVERGED, zero, none, none, none, none, none), problem.W
    solution = solve(problem, solver)
    return solution, refit(replace(problem, V=None), solution.W) if wanted.refit else solution.W


def _answer(name: str, flow: Flow, tape: Tape) -> Tensor:
    """What the layer answers after its ReLU, if it has one, in the solve's dtype."""
    Z = _finite(name, tape.Z)
    Z = Z.to(solve_dtype(Z.dtype))
    return Z.relu() if flow.relu else Z


def _responses(model: nn.Module, todo: Plan, held: Sequence[Inputs], num_samples: int, seed: int) -> dict[str, Tensor]:
    """``{name: (P, M)}``: the answers of all layers, by the weights that the model has now."""
    tapes = record(model, todo.layers, held, inputs=False, num_samples=num_samples, seed=seed)
    return {name: _answer(name, todo.flows[name], tape) for name, tape in tapes.items()}


def _signals(
    model: nn.Module, todo: Plan, held: Sequence[Inputs], before: str | None, name: str, num_samples: int, seed: int
) -> dict[str, Tape]:
    """What one layer sees and what the layer before it answers, in one recording."""
    layers = {key: todo.layers[key] for key in (before, name) if key is not None}
    calls = sum(todo.flows[key].calls for key in layers)
    return record(model, layers, held, num_samples=num_samples, seed=seed, stop_after=calls)


def _feeds(name: str, flow: Flow, source: Tape, target: Tape) -> bool:
    """Whether the target's input is the source's answer, bit by bit and row by row."""
    answer = _answer(name, flow, source)
    return target.X is not None and torch.equal(answer, target.X.to(answer.dtype))


def _length(R: Tensor) -> float:
    """‖R‖_F, summed in double precision."""
    return float(torch.linalg.matrix_norm(R, dtype=torch.float64))


def _finite(name: str, recorded: Tensor | None) -> Tensor:
    """The recording itself, if every number in it is finite."""
    assert recorded is not None
    if not bool(recorded.isfinite().all()):
        raise ValueError(f"{name}: expected finite activations, got NaN or Inf: look at the batches and at the weights")
    return recorded


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
        steps=int(solution.steps),
        seconds=seconds,
        status=Status(int(solution.status)).name,
    )
