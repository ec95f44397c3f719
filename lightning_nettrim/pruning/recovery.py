"""Recovery of a pruned network without labels: its kept weights are tuned to the dense network's output."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.calibration_set import CalibrationSet
from lightning_nettrim.calibration.network_output import find_output
from lightning_nettrim.layers import Layer, joined, masking
from lightning_nettrim.pruning.matching import LOSSES, Improvement, Matching, Schedule, match
from lightning_nettrim.pruning.results import RecoveryReport
from lightning_nettrim.pruning.windows import find_windows, record_outputs
from lightning_nettrim.runtime.sharded import is_sharded, reshard

if TYPE_CHECKING:
    from lightning_nettrim.pruning.session import CalibrationSession

MIN_BATCHES = 10
"""The calibration set is divided into at least so many batches, so that some can be held out."""

NORMS = (
    nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.RMSNorm,
)  # fmt: skip
"""Modules whose scale and shift are tuned."""


@dataclass(frozen=True)
class Recovery(ABC):
    """A method that tunes a pruned network in place. A frozen dataclass of numbers, so that YAML can define it."""

    def check(self, model: nn.Module) -> None:  # noqa: B027 (optional for subclasses)
        """Check, before anything is pruned, that it can tune a model.

        Raises:
            ValueError: if it cannot.
        """

    @abstractmethod
    def recover(self, session: CalibrationSession, masks: Mapping[str, Tensor]) -> RecoveryReport:
        """Tune the pruned model of a session in place; weights that a mask does not keep stay zero.

        Args:
            session: the trained model with its calibration data; the model holds the pruned weights.
            masks: ``{parameter name: bool tensor}``, True where the weight is kept.
        """


@dataclass(frozen=True)
class Distillation(Recovery):
    """Tune kept weights, biases and the scales of norms so that the output reproduces the dense network's.

    The output is that of the layer that is executed last. Adam with a cosine schedule runs over the calibration set; a
    part of it is held out, and the iterate with the lowest loss there is kept, or the pruned network itself. Masks and
    the running statistics of BatchNorms are fixed. No labels are used.

    With ``scope="block"``, `find_windows` cuts the network into windows of consecutive modules, such as its residual
    blocks. One after the other is tuned to its own output in the dense network, by the relative squared error, on the
    inputs that it has in the network recovered so far. Only one window at a time has gradients. Nothing is changed if
    the held-out loss of the network's output is not lower in the end.

    Args:
        loss: ``"kl"``, the Kullback-Leibler divergence of the softmax of both outputs; ``"mse"``, the squared error
            relative to the mean square of the dense output; ``"kl+mse"``, their sum, as the divergence alone has small
            gradients where the dense network is sure; ``"auto"``, the sum if a softmax follows the output, else MSE.
        scope: ``"network"`` tunes all parameters at once; ``"block"`` tunes one window after the other, for networks
            that do not fit into memory with all gradients.
        max_steps: number of steps, for each window in ``scope="block"``.
        lr: learning rate at the beginning.
        holdout: fraction of the calibration batches that is held out.
        check_every: number of steps between two evaluations on the held-out batches.
        seed: of the order of the batches.
    """

    loss: Literal["auto", "kl", "mse", "kl+mse"] = "auto"
    scope: Literal["network", "block"] = "network"
    max_steps: int = 300
    lr: float = 1e-3
    holdout: float = 0.1
    check_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.loss not in ("auto", *LOSSES):
            names = ", ".join(map(repr, LOSSES))
            raise ValueError(f"Distillation.loss: expected 'auto', {names}, got {self.loss!r}")
        if self.scope not in ("network", "block"):
            raise ValueError(f"Distillation.scope: expected 'network' or 'block', got {self.scope!r}")
        for name in ("max_steps", "lr", "check_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Distillation.{name}: expected > 0, got {getattr(self, name)}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"Distillation.holdout: expected a fraction in (0, 1), got {self.holdout}")

    def check(self, model: nn.Module) -> None:
        """Check that windows are not divided among processes, which run the whole network together."""
        if self.scope == "block" and is_sharded(model):
            raise ValueError(
                "recover: expected scope='network' for parameters that are divided among processes, got 'block'"
            )

    def recover(self, session: CalibrationSession, masks: Mapping[str, Tensor]) -> RecoveryReport:
        """Tune the pruned model in place; it stays as it is if nothing improves."""
        start, model = time.perf_counter(), session.model
        session.run.progress.activity = "recovering the pruned network"
        parameters = tuned_parameters(model, session.plan.layers)
        pruned, masks = masking.clone(model, list(parameters)), masking.divided(model, masks)
        with evaluation_mode(model), masking.restored_on_error(model, pruned):
            with session.processes.raise_together():
                network = self._match_network(session)
            recover = self._recover_network if self.scope == "network" else self._recover_windows
            change = recover(session, network, parameters, masks)
            if not change.after < change.before:
                masking.assign(model, pruned)
                change = Improvement(change.before, change.before, 0)
        return RecoveryReport(network.loss, *change, time.perf_counter() - start)

    def _recover_network(
        self,
        session: CalibrationSession,
        network: Matching,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
    ) -> Improvement:
        """Tune all parameters at once to the output of the network."""

        def report(fraction: float) -> None:
            session.run.progress.report("recovering", fraction)

        return match(session.model, network, parameters, masks, self._schedule, session.processes, report)

    def _recover_windows(
        self,
        session: CalibrationSession,
        network: Matching,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
    ) -> Improvement:
        """Tune one window after the other to its output in the dense network, on its inputs in the recovered one.

        A window of at most one layer is left as it is while its inputs have not changed: they are those on which the
        layer was solved.
        """
        model, processes, store = session.model, session.processes, session.run.store
        calibration_set = _calibration_set(session)
        with processes.raise_together():
            windows = find_windows(model, calibration_set[0], session.plan.layers, parameters.values())
        processes.check_agreement({window.name: "a window" for window in windows}, "use scope='network'")
        with processes.raise_together(), _dense(session):
            targets = record_outputs(model, windows, calibration_set, store)
        before, steps, owned = network.held_out_error(processes), 0, set[int]()
        for i, (window, outputs) in enumerate(zip(windows, targets, strict=True)):
            inside = {id(parameter) for parameter in window.parameters()} - owned
            owned |= inside
            tuned = {name: parameter for name, parameter in parameters.items() if id(parameter) in inside}
            if not tuned or (window.layers < 2 and not steps):
                continue
            with processes.raise_together():
                inputs = window.record_inputs(model, calibration_set, store)

            def report(fraction: float, i: int = i) -> None:
                session.run.progress.report("recovering", (i + fraction) / len(windows))

            matching = Matching(window.outputs(inputs), outputs, "mse", network.held_out)
            steps += match(model, matching, tuned, masks, self._schedule, processes, report).steps
        return Improvement(before, network.held_out_error(processes), steps)

    @property
    def _schedule(self) -> Schedule:
        return Schedule(self.max_steps, self.lr, self.check_every, self.seed)

    def _match_network(self, session: CalibrationSession) -> Matching:
        """Find the output of the network and record that of the dense one."""
        calibration_set = _calibration_set(session)
        output = find_output(session.model, calibration_set[0])
        name = ("kl+mse" if output.is_logits else "mse") if self.loss == "auto" else self.loss
        with _dense(session):
            targets = [session.run.store.put([output.of(session.model, batch).detach()]) for batch in calibration_set]
        held_out = max(1, round(self.holdout * len(targets)))
        return Matching(lambda index: output.of(session.model, calibration_set[index]), targets, name, held_out)


def tuned_parameters(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, nn.Parameter]:
    """The parameters of the pruned layers, and scale and shift of all norms, by name."""
    names = [name for layer in layers.values() for name in layer.parameter_names()]
    for path, module in model.named_modules():
        if isinstance(module, NORMS):
            names += [joined(path, key) for key, _ in module.named_parameters(recurse=False)]
    reshard(model)
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in names if name in parameters}


def _calibration_set(session: CalibrationSession) -> CalibrationSet:
    """The calibration set, divided into enough batches for some to be held out."""
    calibration_set = session.activations.calibration_set.divided(MIN_BATCHES)
    if len(calibration_set) < 2:
        raise ValueError("recover: expected at least two calibration batches, got one that cannot be divided")
    return calibration_set


@contextmanager
def _dense(session: CalibrationSession) -> Iterator[None]:
    """A `with` in which the model has its trained weights."""
    pruned = session.snapshot()
    session.restore()
    try:
        yield
    finally:
        session.restore(pruned)
