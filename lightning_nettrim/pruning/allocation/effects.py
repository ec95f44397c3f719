"""Effects of layers: how much an error of one layer changes the output of the network."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.network_output import find_output, only_trainable
from lightning_nettrim.layers import masking
from lightning_nettrim.pruning.allocation.curves import MIN_ERROR, MeasuredLayer
from lightning_nettrim.pruning.session import CalibrationSession, retried, with_smaller_batches
from lightning_nettrim.runtime.distributed import is_out_of_memory
from lightning_nettrim.runtime.fingerprint import fingerprint

DRAWS = 32
"""Minimum number of batches, each with random signs and a network between the trained and the pruned one of its own."""

MIN_INPUTS, MIN_ROWS = 64, 512
"""Minimum numbers of inputs, and of rows of the last layer, on which effects are measured."""


def measure_effects(session: CalibrationSession, layers: Mapping[str, MeasuredLayer]) -> dict[str, float]:
    r"""Effects of layers: relative squared change of the output per squared local error of one layer.

    Let Δ be the change of a layer's parameters when it is pruned alone, δ its local error then, and J the derivative of
    the network's output y by these parameters. The effect is E‖JΔ‖²/(‖y‖²δ²) over batches and networks in which the
    parameters of *all* layers are moved by tΔ, t between 0 and 1. In the trained network alone, the effects of layers
    that can replace each other, such as the branches of a residual block, would be underestimated.

    ‖JΔ‖² is the mean of (vᵀJΔ)² over random signs v, so that one backward pass on a batch serves all layers
    (Hutchinson's estimator).

    Returns:
        ``{name: effect}``. It is 1, as that of the last layer, for layers that do not influence the output found by
        `find_output` or let it overflow, and for all layers of a network without gradients. The model has its trained
        weights.
    """
    key = fingerprint(session.fingerprint, {name: fingerprint(layer.values) for name, layer in layers.items()})

    def measure() -> tuple[dict[str, Tensor], dict[str, float]]:
        session.run.progress.activity = "measuring the effects of layers on the output"
        session.run.progress.report("measuring effects", 0.0)
        try:
            with evaluation_mode(session.model):
                squares, _ = retried(session, lambda s: _relative_squares(s, layers), with_smaller_batches)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            session.run.note(f"zeros are distributed by local errors, because the output has no gradients: {error}")
            squares = dict.fromkeys(layers, 0.0)
        finally:
            session.restore()
        measured = {name: square / max(layers[name].error, MIN_ERROR) ** 2 for name, square in squares.items()}
        return {}, {name: effect if 0 < effect < math.inf else 1.0 for name, effect in measured.items()}

    return session.run.cached("effects", key, measure)[1]


def _relative_squares(session: CalibrationSession, layers: Mapping[str, MeasuredLayer]) -> dict[str, float]:
    """E‖JΔ‖²/‖y‖² of each layer; the model is left with changed weights."""
    model, parameters = session.model, dict(session.model.named_parameters())
    changes = {
        name: {key: value.to(session.dense[key]) - session.dense[key] for key, value in layer.values.items()}
        for name, layer in layers.items()
    }
    keys = [key for change in changes.values() for key in change]
    tuned = [parameters[key] for key in keys]
    inputs = session.activations.calibration_set.inputs
    rows = math.ceil(MIN_ROWS * inputs / session.plan.rows[session.last])
    batches = session.activations.first_inputs(max(MIN_INPUTS, rows)).calibration_set.divided(DRAWS)
    squares, energy = torch.zeros(len(layers), dtype=torch.float64), 0.0
    generator = torch.Generator().manual_seed(session.config.seed + session.processes.rank)
    with session.processes.raise_together(), only_trainable(model, tuned):
        output = find_output(model, batches[0])
        count = max(DRAWS, len(batches))
        for draw in range(count):
            t = (draw + 0.5) / count
            for change in changes.values():
                masking.assign(model, {key: session.dense[key] + t * delta for key, delta in change.items()})
            with torch.enable_grad():
                y = output.of(model, batches[draw % len(batches)])
            signs = (torch.randint(0, 2, y.shape, generator=generator) * 2 - 1).to(y)
            gradients = dict(zip(keys, torch.autograd.grad(y, tuned, signs, allow_unused=True), strict=True))
            squares += torch.tensor([_inner(gradients, change) ** 2 for change in changes.values()])
            energy += float(y.detach().double().square().sum())
    total = session.processes.sum(torch.cat([squares, torch.tensor([energy], dtype=torch.float64)]))
    return dict(zip(layers, (total[:-1] / total[-1].clamp(min=1e-30)).tolist(), strict=True))


def _inner(gradients: Mapping[str, Tensor | None], change: Mapping[str, Tensor]) -> float:
    """The inner product of the gradients of a layer's parameters with their change."""
    pairs = ((gradients[key], delta) for key, delta in change.items())
    return sum(float((g * delta).sum(dtype=torch.float64)) for g, delta in pairs if g is not None)
