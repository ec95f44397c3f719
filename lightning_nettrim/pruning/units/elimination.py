"""Selection of units by the response errors of the layers that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.pruning.allocation.curves import ErrorCurve, MeasuredLayer
from lightning_nettrim.pruning.allocation.effects import measure_effects
from lightning_nettrim.pruning.allocation.network_error import GlobalAllocation, with_compensation
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.layer import local_error
from lightning_nettrim.pruning.layer_problem import layer_problem
from lightning_nettrim.pruning.session import CalibrationSession
from lightning_nettrim.pruning.units.base import KeptUnits, MeasuredUnits, UnitSelection
from lightning_nettrim.pruning.units.groups import UnitGroup, rows_of_channels
from lightning_nettrim.runtime.fingerprint import fingerprint
from lightning_nettrim.solvers.elimination import Reader, eliminate, problems_of_groups

FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.22, 0.16, 0.11, 0.08, 0.05, 0.03, 0.02, 0.01)
"""Fractions of a group's units at which the errors of its readers are measured."""

REFERENCE = 0.5
"""The fraction at which the effects of the readers on the output are measured."""


@dataclass(frozen=True)
class Elimination(UnitSelection):
    """Keeps those units without which the layers that read them change the network's output most.

    The units of a group are eliminated one after the other by the exact increase of the squared response errors of all
    layers that read them, which are solved again for the units that are left (see `solvers.elimination`). A group loses
    units by the errors of its readers, times their effects on the output.
    """

    def measure(
        self, session: CalibrationSession, batch: CalibrationBatch, groups: Mapping[str, UnitGroup]
    ) -> MeasuredUnits:
        """The error curves of the readers of each group, and their effects on the output."""
        curves, readers = dict[str, dict[str, ErrorCurve]](), dict[str, MeasuredLayer]()
        for i, (name, group) in enumerate(groups.items()):
            session.run.progress.activity = f"measuring the units of {name}"
            session.run.progress.report("measuring units", i / len(groups))
            measured = measure_readers(session, group)
            curves[name] = {reader: layer.curve for reader, layer in measured.items()}
            readers |= {reader: layer for reader, layer in measured.items() if reader not in readers}
        effects = measure_effects(session, {name: readers[name] for name in session.plan.layers if name in readers})
        if session.config.scheme == "cascade":
            effects = with_compensation(effects, GlobalAllocation().compensation)
        return _Errors(session, groups, curves, effects)


@dataclass(frozen=True, eq=False)
class _Errors(MeasuredUnits):
    """The response errors of the layers that read units.

    Attributes:
        session: the trained model with its calibration data.
        groups: the groups of units.
        curves: ``{group: {reader: its error as a function of the number of units}}``.
        effects: of the squared local error of each reader on the output.
    """

    session: CalibrationSession
    groups: Mapping[str, UnitGroup]
    curves: Mapping[str, Mapping[str, ErrorCurve]]
    effects: Mapping[str, float]

    def loss(self, group: str, count: int) -> float:
        """The squared change of the output, as far as it is the sum of the readers' parts."""
        return sum(self.effects[reader] * curve.at(count) ** 2 for reader, curve in self.curves[group].items())

    def select(self, kept: Mapping[str, int]) -> dict[str, KeptUnits]:
        """The units that elimination leaves.

        The groups are treated from the output to the input, so that what computes removed units does not count.
        """
        session, groups = self.session, self.groups
        order = {name: i for i, name in enumerate(session.plan.layers)}
        masks: dict[str, Tensor] = {}
        dead: dict[str, list[Tensor]] = {}
        for name in sorted(groups, key=lambda name: -order[list(groups[name].readers)[-1]]):
            group = groups[name]
            session.run.progress.activity = f"selecting the units of {name}"
            session.run.progress.report("selecting units", len(masks) / len(groups))
            if kept[name] == group.size:
                masks[name] = torch.ones(group.size, dtype=torch.bool)
                continue
            readers = _readers(session, group, dead, self.effects)
            *_, stage = eliminate(_parts(readers), _stages(group.size, kept[name]))
            masks[name] = stage.kept.cpu()
            for path, channels in group.producers.items():
                dead.setdefault(path, []).append(channels[~masks[name]].flatten())
        return {name: KeptUnits(mask) for name, mask in masks.items()}


class _ReadingLayer(NamedTuple):
    """A layer that reads units: its problem, and a reader for each of its groups."""

    problem: LayerProblem
    groups: list[Reader]


def measure_readers(session: CalibrationSession, group: UnitGroup) -> dict[str, MeasuredLayer]:
    """The readers of a group without some of its units; the model must be the trained one.

    Each has its error as a function of the number of units, and its parameters with the REFERENCE fraction of them.
    They are measured once per session, also over interrupted runs.
    """
    counts = sorted({max(1, round(fraction * group.size)) for fraction in FRACTIONS} - {group.size}, reverse=True)
    reference = counts.index(min(counts, key=lambda count: abs(count - REFERENCE * group.size)))

    def measure() -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        readers = _readers(session, group, {}, dict.fromkeys(group.readers, 1.0))
        errors, values = dict[str, list[float]](), dict[str, Tensor]()
        for i, stage in enumerate(eliminate(_parts(readers), counts)):
            solutions = iter(stage.solutions)
            for name, reader in readers.items():
                W = torch.cat([next(solutions) for _ in reader.groups])
                errors.setdefault(name, []).append(local_error(reader.problem, W))
                if i == reference:
                    values |= session.folded_layers[name].to_parameters(W)
        return values, errors

    key = fingerprint(session.fingerprint, group.name, group.size)
    values, errors = session.run.cached(f"units-{group.name}", key, measure)
    layers = {}
    for name, own in errors.items():
        curve = ErrorCurve((*reversed(counts), group.size), (*reversed(own), 0.0))
        written = session.folded_layers[name].written_names
        layers[name] = MeasuredLayer(curve, own[reference], {key: values[key] for key in written if key in values})
    return layers


def _stages(size: int, kept: int) -> list[int]:
    """Numbers of units at which targets are updated: down to the given one, by an eighth of the units."""
    steps = max(size // 8, 1)
    return [*range(size - steps, kept, -steps), kept]


def _readers(
    session: CalibrationSession,
    group: UnitGroup,
    dead: Mapping[str, Sequence[Tensor]],
    effects: Mapping[str, float],
) -> dict[str, _ReadingLayer]:
    """The readers of a group on the activations of the model.

    Args:
        session: the trained model with its calibration data.
        group: the group of units.
        dead: outputs of modules that are not read.
        effects: of the squared local error of each reader on the output.
    """
    readers = {}
    with evaluation_mode(session.model):
        recordings = session.activations.record(*group.readers, outputs=())
    for name in group.readers:
        problem = layer_problem(session, name, recordings.pop(name), Budget(sparsity=0.0), trained_inputs=True)
        layer = session.plan.layers[name]
        weights = problem.Y.new_ones(problem.Y.shape[0] * problem.Y.shape[-1], dtype=torch.float64)
        if name in session.importance:
            weights = session.importance[name].double().flatten().square()
        for outputs in dead.get(layer.path, []):
            weights = weights.index_fill(0, outputs.to(weights.device), 0)
        energy = float(problem.processes.sum(problem.Y.double().square().sum())) or 1.0
        rows = rows_of_channels(layer, group.readers[name]).to(problem.Y.device)
        parts = zip(problems_of_groups(problem), (weights * effects[name] / energy).chunk(layer.groups), strict=True)
        readers[name] = _ReadingLayer(problem, [Reader(own, rows, weight) for own, weight in parts])
    return readers


def _parts(readers: Mapping[str, _ReadingLayer]) -> list[Reader]:
    """The groups of all layers."""
    return [part for reader in readers.values() for part in reader.groups]
