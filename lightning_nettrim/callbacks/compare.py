"""Compare: validation passes of one network beside another, each into its own run of the user's loggers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


def sibling(logger: Logger, name: str) -> Logger:
    """A logger of the same kind in the folder ``name`` of this logger's run; a mute one for kinds without folders."""
    if isinstance(logger, TensorBoardLogger):
        return TensorBoardLogger(logger.log_dir, name="", version=name, default_hp_metric=False)
    if isinstance(logger, CSVLogger):
        return CSVLogger(logger.log_dir, name="", version=name)
    return DummyLogger()


@contextmanager
def apart(trainer: pl.Trainer, loggers: list[Logger]) -> Iterator[None]:
    """A `with` in which the trainer has these loggers and no callbacks; its stage and all else are put back."""
    kept = trainer.loggers, trainer.callbacks, trainer.state.stage  # type: ignore[attr-defined]
    trainer.loggers, trainer.callbacks = loggers, []  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trainer.loggers, trainer.callbacks, trainer.state.stage = kept  # type: ignore[attr-defined]


def validation(trainer: pl.Trainer, name: str | None = None) -> dict[str, float]:
    """Metrics of one pass over the validation data, empty without such data.

    They are logged into the sibling runs ``name``, or nowhere if there is no name.

    Callbacks take no part: early stopping, checkpoints and progress bars see only the user's own validation.
    """
    fitting = trainer.state.fn == TrainerFn.FITTING
    if fitting and not trainer.enable_validation:
        return {}
    loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    runs = [] if name is None else [sibling(logger, name) for logger in trainer.loggers]
    verbose, modes = loop.verbose, dict(loop._module_mode.mode)
    loop.verbose = False
    try:
        with apart(trainer, runs):
            trainer.validating = True
            outputs = loop.run()
    finally:
        loop.verbose, loop._module_mode.mode = verbose, modes
        for run in runs:
            run.finalize("success")
    metrics = averages(trainer, {key: value for output in outputs for key, value in output.items()})
    for logger, run in zip(trainer.loggers, runs, strict=False):
        if isinstance(run, DummyLogger) and metrics:
            logger.log_metrics({f"{name}/{key}": value for key, value in metrics.items()}, trainer.global_step)
    return metrics


def averages(trainer: pl.Trainer, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics over all processes; those that were logged with ``sync_dist`` are that already."""
    return {key: float(trainer.strategy.reduce(value.clone(), reduce_op="mean")) for key, value in metrics.items()}


def restart(trainer: pl.Trainer) -> None:
    """Let a ``validate`` in whose start hook its data were read begin anew."""
    trainer.validate_loop.reset()
    trainer.lightning_module.on_validation_model_eval()
