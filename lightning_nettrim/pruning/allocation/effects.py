"""Effects of layers: how much an error of one layer changes the output of the network."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.network_output import find_output
from lightning_nettrim.layers import masking
from lightning_nettrim.pruning.allocation.curves import MIN_ERROR, MeasuredLayer
from lightning_nettrim.pruning.session import CalibrationSession, retried, with_smaller_batches
from lightning_nettrim.runtime.fingerprint import fingerprint

MAX_ROWS = 512
"""Effects are measured on as many inputs as give the last layer so many rows, in all processes together."""

MIN_BATCHES = 4
"""The calibration set is divided into at least so many batches, of which the first ones are used."""


def measure_effects(session: CalibrationSession, layers: Mapping[str, MeasuredLayer]) -> dict[str, float]:
    """Effects of layers: relative squared change of the output per squared local error of one layer.

    Let Δ be the change of a layer's parameters when it is pruned alone, and δ its local error then. In a network in
    which the parameters of *all* layers are moved by Δ/2, one layer gets its trained parameters back, which changes
    the output y by d: the effect is ‖2d‖²/(‖y‖²δ²). In the trained network, the effects of layers that can replace each
    other, such as the branches of a residual block, would be underestimated.

    Returns:
        ``{name: effect}``. It is 1, as that of the last layer, for layers that do not influence the output found by
        `find_output` or let it overflow. The model has its trained weights.
    """
    key = fingerprint(session.fingerprint, {name: fingerprint(layer.values) for name, layer in layers.items()})

    def measure() -> tuple[dict[str, Tensor], dict[str, float]]:
        session.run.progress.activity = "measuring the effects of layers on the output"
        try:
            with evaluation_mode(session.model):
                squares, _ = retried(session, lambda s: _relative_squares(s, layers), with_smaller_batches)
        finally:
            session.restore()
        measured = {name: square / max(layers[name].error, MIN_ERROR) ** 2 for name, square in squares.items()}
        return {}, {name: effect if 0 < effect < math.inf else 1.0 for name, effect in measured.items()}

    return session.run.cached("effects", key, measure)[1]


def _relative_squares(session: CalibrationSession, layers: Mapping[str, MeasuredLayer]) -> dict[str, float]:
    """‖2d‖²/‖y‖² of each layer; the model is left with changed weights."""
    model, dense, calibration_set = session.model, session.dense, session.activations.calibration_set
    inputs, rows = calibration_set.inputs, MAX_ROWS / session.processes.count
    enough = math.ceil(rows * inputs / session.plan.rows[session.last])
    part = calibration_set.divided(MIN_BATCHES).first(min(enough, inputs))
    halfway = {
        name: {key: torch.lerp(dense[key], value.to(dense[key]), 0.5) for key, value in layer.values.items()}
        for name, layer in layers.items()
    }
    squares, energy = dict.fromkeys(layers, 0.0), 0.0
    with session.processes.raise_together():
        session.restore()
        output = find_output(model, part[0])
        for i, batch in enumerate(part):
            session.run.progress.report("measuring effects", i / len(part))
            for values in halfway.values():
                masking.assign(model, values)
            y = output.of(model, batch)
            energy += _square(y)
            for name, values in reversed(halfway.items()):  # so that the layers before are not computed again
                masking.assign(model, {key: dense[key] for key in values})
                squares[name] += _square(2 * (output.of(model, batch) - y))
                masking.assign(model, values)
    total = session.processes.sum(torch.tensor([*squares.values(), energy], dtype=torch.float64))
    return dict(zip(layers, (total[:-1] / total[-1].clamp(min=1e-30)).tolist(), strict=True))


def _square(values: Tensor) -> float:
    """Sum of the squares, in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
