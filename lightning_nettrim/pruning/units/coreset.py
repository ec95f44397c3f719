"""Selection of units by data-independent coresets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.replaced import constant_outputs, mean_inputs
from lightning_nettrim.layers import Layer
from lightning_nettrim.pruning.session import CalibrationSession
from lightning_nettrim.pruning.units.base import KeptUnits, MeasuredUnits, UnitSelection
from lightning_nettrim.pruning.units.groups import UnitGroup, rows_of_channels
from lightning_nettrim.runtime.sharded import full
from lightning_nettrim.solvers.coreset import inclusion_probabilities, sample_of_fixed_size, theorem_error, theorem_size

POINTS = 9
"""Values between the bounds of a unit's products at which what its readers receive is evaluated."""

MONOTONE = 1e-4
"""Change in the wrong direction, relative to the range of the values, that is taken for rounding."""


@dataclass(frozen=True)
class Coreset(UnitSelection):
    r"""Keeps a coreset of the units of each group, by what the layers that read them can receive from them.

    A unit has the sensitivity s = maxᵢ|wᵢ|·max|φ(wᵀx + b)| over all inputs ‖x‖ ≤ β, where wᵢ are the weights that read
    it, and φ is everything between the layer that computes it and the layers that read it, as a BatchNorm and a ReLU. φ
    must be monotone, as ReLU, sigmoid, tanh and softplus are. No data are needed: calibration inputs determine the
    shapes and, unless ``beta`` is given, β.

    Args:
        sampling: ``deterministic`` keeps the units with the largest sensitivities; ``importance`` draws units with
            probabilities π proportional to them and, without a refit, divides the weights that read them by π, so that
            their expected response is the trained one.
        beta: β, the bound of the norm of the inputs of each layer that computes units; ``None`` is the largest norm
            among the calibration inputs.
        inputs: what a refit of the layers that read the units is fitted to: ``recorded`` calibration inputs, or
            ``synthetic`` ones, random inputs of a norm up to β, in the scheme ``parallel``.
        count: number of units of each group, in place of a budget.
        error: ε of the theorem, the absolute error of a product of the layers that read the units. The number of units
            of each group follows from it, in place of a budget. It is usually more than there are.
        failure: δ of the theorem, the probability of a larger error.
        seed: of the random numbers.

    Raises:
        ValueError: for numbers outside their ranges.

    References:
        Mussay, Osadchy, Braverman, Zhou, Feldman, "Data-Independent Neural Pruning via Coresets", ICLR 2020. They draw
        with replacement until there are enough different neurons, which is biased; here samples have a fixed size (see
        `solvers.coreset`).
    """

    sampling: Literal["deterministic", "importance"] = "deterministic"
    beta: float | None = None
    inputs: Literal["recorded", "synthetic"] = "recorded"
    count: int | None = None
    error: float | None = None
    failure: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every option."""
        for name, choices in (("sampling", ("deterministic", "importance")), ("inputs", ("recorded", "synthetic"))):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"Coreset: {name}: expected {' or '.join(map(repr, choices))}, got {value!r}")
        for name in ("beta", "error"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"Coreset: {name}: expected > 0, got {value}")
        if not 0 < self.failure < 1:
            raise ValueError(f"Coreset: failure: expected a probability in (0, 1), got {self.failure}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"Coreset: count: expected at least 1, got {self.count}")
        if self.count is not None and self.error is not None:
            raise ValueError(f"Coreset: expected one of count and error, got {self.count} and {self.error}: choose one")

    @property
    def sets_sizes(self) -> bool:
        """Whether ``count`` or ``error`` determines how many units are kept."""
        return self.count is not None or self.error is not None

    @property
    def uses_synthetic_inputs(self) -> bool:
        """Whether layers are refitted on synthetic inputs."""
        return self.inputs == "synthetic"

    def measure(
        self, session: CalibrationSession, batch: CalibrationBatch, groups: Mapping[str, UnitGroup]
    ) -> MeasuredUnits:
        """The sensitivities of all units.

        Raises:
            ValueError: if a unit is not a monotone function of one layer's product.
        """
        layers = session.plan.layers
        for group in groups.values():
            if mixing := [path for path in group.channelwise if path in layers]:
                raise ValueError(
                    f"Coreset: {group.name}: expected units that are read directly, got the depthwise convolution"
                    f" {mixing[0]} in between: ignore {', '.join(group.producers)}, or use another selection"
                )
        radii = {path: self._radius(session, layers[path]) for group in groups.values() for path in group.producers}
        found = {}
        for i, (name, group) in enumerate(groups.items()):
            session.run.progress.activity = f"measuring the units of {name}"
            session.run.progress.report("measuring units", i / len(groups))
            received = _largest_received(session.model, batch, group, layers, radii)
            s = torch.zeros(group.size, dtype=torch.float64)
            for reader, channels in group.readers.items():
                layer = layers[reader]
                rows = rows_of_channels(layer, channels)
                W = layer.to_matrix(full(layer.parameter.detach())).abs().amax(-1).double().cpu()
                each = W[:, rows].unflatten(-1, (channels.shape[1] // layer.groups, -1)).amax(-1)  # (groups, size, c)
                each = each.movedim(0, 1).flatten(1)
                s = torch.maximum(s, (each * received[reader]).amax(-1))
            found[name] = s
        return _Sensitivities(self, session, groups, found, radii)

    def _radius(self, session: CalibrationSession, layer: Layer) -> float:
        """β of a layer."""
        if self.beta is not None:
            return self.beta
        with evaluation_mode(session.model):
            X = session.activations.record(layer.name, outputs=())[layer.name].X
        assert X is not None
        return max(session.processes.gather(float(X.double().norm(dim=-1).amax())))


@dataclass(frozen=True, eq=False)
class _Sensitivities(MeasuredUnits):
    """The sensitivities of the units of each group.

    Attributes:
        coreset: the options.
        session: the trained model with its calibration data.
        groups: the groups of units.
        sensitivities: ``{group: (size,)}``.
        radii: ``{module: β}`` of the modules that compute units.
    """

    coreset: Coreset
    session: CalibrationSession
    groups: Mapping[str, UnitGroup]
    sensitivities: Mapping[str, Tensor]
    radii: Mapping[str, float]

    def loss(self, group: str, count: int) -> float:
        """The squared error that the sensitivities bound, relative to that without all units.

        Of a sample it is the variance Σ(1/π − 1)s², of the largest sensitivities the square of the sum of the others.
        """
        s = self.sensitivities[group]
        total = float(s.sum()) or 1.0
        if self.coreset.sampling == "importance":
            p = inclusion_probabilities(s, count)
            return float(((1 / p - 1) * s.square()).sum()) / total**2
        return float(s.sort(descending=True).values[count:].sum() / total) ** 2

    def sizes(self) -> dict[str, int]:
        """The given number of units, or that of the theorem, in each group."""
        if self.coreset.count is not None:
            return {name: min(self.coreset.count, group.size) for name, group in self.groups.items()}
        assert self.coreset.error is not None
        return {
            name: min(theorem_size(*self._theorem(name), self.coreset.error, self.coreset.failure), group.size)
            for name, group in self.groups.items()
        }

    def select(self, kept: Mapping[str, int]) -> dict[str, KeptUnits]:
        """The coreset of each group."""
        coreset, refit = self.coreset, self.session.config.refit
        selected = {}
        for i, (name, group) in enumerate(self.groups.items()):
            s, scales = self.sensitivities[name], torch.ones(group.size, dtype=torch.float64)
            if coreset.sampling == "importance":
                p = inclusion_probabilities(s, kept[name])
                mask, scales = sample_of_fixed_size(p, torch.Generator().manual_seed(coreset.seed + i)), 1 / p
            else:
                mask = torch.zeros(group.size, dtype=torch.bool).index_fill(0, s.topk(kept[name]).indices, True)
            synthetic = {path: self.radii[path] for path in group.producers} if coreset.uses_synthetic_inputs else {}
            selected[name] = KeptUnits(mask, None if refit else scales, synthetic if refit else {})
            total, dimension = self._theorem(name)
            error = theorem_error(total, dimension, kept[name], coreset.failure)
            self.session.run.notes.append(
                f"coreset of {name}: {kept[name]} of {group.size} units, total sensitivity {total:.4g}; by the theorem,"
                f" a sample of so many has an error of at most {error:.4g} with a probability of"
                f" {1 - coreset.failure:g}, up to its constant"
            )
        return selected

    def _theorem(self, group: str) -> tuple[float, int]:
        """The total sensitivity of a group, and the number of weights of its units."""
        layers = self.session.plan.layers
        return float(self.sensitivities[group].sum()), max(layers[p].inputs + 1 for p in self.groups[group].producers)


def _largest_received(
    model: nn.Module,
    batch: CalibrationBatch,
    group: UnitGroup,
    layers: Mapping[str, Layer],
    radii: Mapping[str, float],
) -> dict[str, Tensor]:
    """``{reader: (size, c)}``: the largest value that each reader receives from a unit, for all inputs in the radius.

    The network runs with the outputs of the layers that compute the units replaced by values between their bounds
    b ± β‖w‖, so that everything between them and the readers is evaluated as it is.

    Raises:
        ValueError: if what a reader receives is not a monotone function of them.
    """
    centers, ranges = dict[str, Tensor](), dict[str, Tensor]()
    for path, channels in group.producers.items():
        layer = layers[path]
        norms = layer.to_matrix(full(layer.parameter.detach())).double().norm(dim=-2).flatten()
        bias = torch.zeros_like(norms)
        if layer.bias is not None:
            bias = full(layer.module.get_parameter(layer.bias).detach()).double()
        own = torch.full_like(norms, torch.nan)
        index = channels.flatten().to(own.device)
        own[index] = bias[index]
        centers[path], ranges[path] = own, radii[path] * norms
    received: dict[str, list[Tensor]] = {name: [] for name in group.readers}
    inputs = {name: layers[name] for name in group.readers}
    with evaluation_mode(model):
        for t in torch.linspace(-1, 1, POINTS, dtype=torch.float64):
            values = {path: center + float(t) * ranges[path] for path, center in centers.items()}
            with constant_outputs(layers, values), mean_inputs(inputs) as recorded:
                batch(model)
            for name, x in recorded.items():
                received[name].append(x[group.readers[name].cpu()])
    largest = {}
    for name, values_of in received.items():
        x = torch.stack(values_of)
        steps, size = x.diff(dim=0), x.abs().amax(0)
        tolerance = MONOTONE * (x.amax(0) - x.amin(0))
        monotone = (steps >= -tolerance).all(0) | (steps <= tolerance).all(0)
        if not bool(monotone.all()):
            raise ValueError(
                f"Coreset: {group.name}: expected units that {name} reads through a monotone function, such as ReLU,"
                f" sigmoid or tanh, got another one for {int((~monotone).any(-1).sum())} of {group.size}: ignore"
                f" {', '.join(group.producers)}, or use another selection"
            )
        largest[name] = size
    return largest
