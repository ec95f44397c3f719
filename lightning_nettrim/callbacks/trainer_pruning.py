"""Pruning the module of a Trainer on the Trainer's own calibration batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.callbacks.calibration_data import calibration_batches
from lightning_nettrim.callbacks.steps import STEPS, LoadedBatch, StepForward, choose_step
from lightning_nettrim.callbacks.strategy import is_distributed
from lightning_nettrim.compaction import CompactionReport, report_compaction
from lightning_nettrim.layers import Layer, check_model
from lightning_nettrim.pruning.api import check_pruning, prune_model
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.plan_file import select_layers
from lightning_nettrim.pruning.results import PruningResult
from lightning_nettrim.pruning.session_setup import CalibrationSource
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup

BATCH_SIZES = 1, 256
"""Batch sizes at which the time of a forward pass is measured before and after compaction."""


class TrainerPruning:
    """Calls `prune_model` and `check_pruning` with the batches, the step and the processes of a Trainer.

    Args:
        config: the options of pruning.
        calibration: the data to calibrate on, ``"train"`` or ``"val"``.
        calibration_step: name of the step that batches run through; ``None`` is the first one that accepts them.
    """

    def __init__(self, config: PruningConfig, calibration: str, calibration_step: str | None) -> None:
        self._config, self._calibration, self._requested_step = config, calibration, calibration_step
        self._step: StepForward | None = None
        self._first: LoadedBatch | None = None  # calibration batch of the last pruning

    def reset(self) -> None:
        """Forget the step that was chosen for a module, and its batch."""
        self._step = self._first = None

    @property
    def step_name(self) -> str | None:
        """Name of the chosen step; ``None`` until it is chosen."""
        return None if self._step is None else self._step.step

    def find_layers(self, pl_module: pl.LightningModule) -> dict[str, Layer]:
        """The layers to prune.

        Raises:
            MisconfigurationException: for a network that cannot be pruned and for keys that match nothing in it.
        """
        try:
            check_model(pl_module)
            layers, _, _ = select_layers(self._config, pl_module).find(pl_module)
        except ValueError as error:
            raise MisconfigurationException(f"NetTrim: {error}") from error
        step = self._requested_step
        if step is not None and not callable(getattr(pl_module, step, None)):
            raise MisconfigurationException(
                f"NetTrim: calibration_step: expected a method of {type(pl_module).__name__}, such as"
                f" {', '.join(STEPS[1:])}, got {step!r}"
            )
        return layers

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loaded: LoadedBatch) -> None:
        """Record a batch and solve one layer, as after training; the random state does not change.

        Raises:
            MisconfigurationException: if pruning would fail.
        """
        with isolate_rng():
            if self._calibration == "val":
                loaded = next(calibration_batches(trainer, pl_module, "val", 1))
            source = CalibrationSource([loaded], self._forward(trainer, pl_module, loaded), is_distributed(trainer))
            try:
                check_pruning(pl_module, source, self._config)
            except ValueError as error:
                raise MisconfigurationException(f"NetTrim: pruning would fail after this fit: {error}") from error

    def prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, **more: Any) -> PruningResult:
        """Prune the module in place; see `prune_model` for further arguments.

        Raises:
            MisconfigurationException: if there are no calibration batches.
        """
        first, batches = self._batches(trainer, pl_module)
        source = CalibrationSource(
            chain([first], batches), self._forward(trainer, pl_module, first), is_distributed(trainer)
        )
        return prune_model(pl_module, source, self._config, **more)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the step and load a batch as `prune` does, for a network that an earlier fit has pruned."""
        if self._first is None:
            with isolate_rng():
                self._forward(trainer, pl_module, self._batches(trainer, pl_module)[0])

    def _batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[LoadedBatch, Iterator[LoadedBatch]]:
        """The first calibration batch, which is kept, and the others."""
        batches = calibration_batches(trainer, pl_module, self._calibration, self._config.num_samples)
        with processes_of(trainer, pl_module).raise_together():
            first = next(batches, None)
            if first is None:
                raise MisconfigurationException(
                    "NetTrim: expected batches to calibrate on, got none: the loader is empty"
                )
        self._first = first
        return first, batches

    def report_compaction(self, pl_module: pl.LightningModule) -> CompactionReport:
        """What the pruned module without its unread units saves; call it after `prune` or `prepare`."""
        assert self._first is not None
        assert self._step is not None
        return report_compaction(pl_module, CalibrationBatch(self._first, self._step), BATCH_SIZES)

    def _forward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loaded: LoadedBatch) -> StepForward:
        """How calibration batches run through the module, chosen on one of them."""
        if self._step is None:
            layers = self.find_layers(pl_module)
            processes = processes_of(trainer, pl_module)
            try:
                with processes.raise_together():
                    step = choose_step(trainer, pl_module, layers, loaded, self._requested_step)
                processes.check_agreement({"calibration_step": step.step}, "name one step by calibration_step")
            except ValueError as error:
                raise MisconfigurationException(f"NetTrim: {error}") from error
            self._step = step
        return self._step


def processes_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> ProcessGroup:
    """The processes that prune the module of a Trainer together."""
    return TorchProcessGroup.of(pl_module) if is_distributed(trainer) else SINGLE_PROCESS
