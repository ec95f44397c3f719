"""The problem of one layer, from its recorded activations and what follows it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_nettrim.calibration.recording import Recording
from lightning_nettrim.core.activation import Rectifier
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.session import CalibrationSession

SLACK = 1.1
"""Slack γ of the ball in a cascade, ε² ≥ γ‖(XW − Y)_Ω‖² (Aghasi et al. 2020)."""

RIDGE = 1e-2
"""Ridge towards the trained weights where there are as many samples as inputs.

With few samples a fit without a ridge overfits, and in a deep network the errors grow from layer to layer.
"""


def layer_problem(
    session: CalibrationSession, name: str, recording: Recording, budget: Budget, trained_inputs: bool
) -> LayerProblem:
    """The problem of a layer, with the BatchNorm that follows folded into its weights.

    For the convex program, of which the trained weights must be feasible, the cascade requires ε² ≥ γ‖(XW − Y)_Ω‖² and
    uses the limit V = max(XW, 0): what is below zero off Ω is zero after the ReLU, so the paper's V = XW would only
    exclude solutions that are equally good. For other methods the limit is that of the trained layer. The convex
    program has no slope below zero: there the response is treated as linear.

    Args:
        session: the trained model with its calibration data.
        name: of the layer.
        recording: of its inputs and residuals.
        budget: of the layer.
        trained_inputs: whether the inputs are those of the trained network.
    """
    folded, processes = session.folded_layers[name], session.processes
    if budget.synthetic_inputs:
        folded, recording = _without_residual(folded, recording)
        Y = folded.response(session.activations.outputs(name, recording), None)
    else:
        Y = session.reference[name]
    X, offset = session.activations.inputs(name, recording), session.activations.offset(name, recording)
    rectifier = folded.rectifier
    convex = session.config.solver_for(budget.epsilon).takes_epsilon
    if convex and rectifier is not None and rectifier.slope is not None:
        Y, rectifier = torch.where(Y > 0, Y, rectifier.inverse(Y)), None
    problem = LayerProblem(
        X,
        Y,
        folded.matrix(),
        sparsity=budget.sparsity,
        Omega=None if rectifier is None else rectifier.active(Y),
        rectifier=rectifier or Rectifier(),
        offset=None if offset is None else offset.expand_as(Y),
        penalty=folded.layer.penalty(X) if folded.shift_in_bias else None,
        pattern=budget.pattern,
        groups=folded.layer.groups,
        processes=processes,
    )
    problem = replace(problem, ridge=_ridge(problem.num_samples(), X.shape[-1]))
    norm = processes.norm(torch.linalg.matrix_norm(Y))
    radius = (budget.epsilon or 1e-3) * torch.where(norm > 0, norm, 1)
    if not convex:
        return replace(problem, epsilon=radius)
    return _with_feasible_trained_weights(problem, radius, rectifier, trained_inputs)


def _without_residual(folded: FoldedLayer, recording: Recording) -> tuple[FoldedLayer, Recording]:
    """A layer with a linear response in place of one after the sum with a residual, which depends on data."""
    if recording.R is None:
        return folded, recording
    return replace(folded, rectifier=None), replace(recording, R=None)


def _with_feasible_trained_weights(
    problem: LayerProblem, radius: Tensor, rectifier: Rectifier | None, trained_inputs: bool
) -> LayerProblem:
    """The convex program with the smallest radius and limit for which the trained weights are feasible."""
    U = problem.X @ problem.W if problem.offset is None else problem.X @ problem.W + problem.offset
    trained_distance = problem.processes.norm(torch.linalg.matrix_norm(problem.on_Omega(U - problem.Y)))
    V = None
    if not trained_inputs and rectifier is not None:
        V = torch.where(problem.at_upper_bound, U.clamp(max=rectifier.high), U.clamp(min=rectifier.low))
    return replace(problem, epsilon=torch.maximum(radius, trained_distance * SLACK**0.5), V=V)


def _ridge(P: int, N: int) -> float:
    """RIDGE·(N/P)⁸: negligible from four samples per input on."""
    ridge = min(RIDGE * (N / P) ** 8, 1e4)
    return ridge if ridge > 1e-7 else 0.0
