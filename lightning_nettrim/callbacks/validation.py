"""Validation passes of the dense and the pruned network, each logged to its own run of the user's loggers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_nettrim.callbacks.lightning_package import dummy_logger, fitting, is_a, of_package
from lightning_nettrim.callbacks.preserve import preserved


class ValidationMetrics(NamedTuple):
    """The metrics of one pass over the validation data: the logged ones, and all that can be monitored."""

    logged: dict[str, float]
    monitored: dict[str, float]


def sibling(trainer: pl.Trainer, logger: Logger, name: str) -> Any:
    """A logger of the same kind in the folder ``name`` of a logger's run; one that logs nothing for other kinds."""
    for cls in type(logger).__mro__:
        if cls.__name__ == "TensorBoardLogger":
            return cls(logger.log_dir, name="", version=name, default_hp_metric=False)
        if cls.__name__ == "CSVLogger":
            return cls(logger.log_dir, name="", version=name)
    return dummy_logger(trainer)


@contextmanager
def isolated(trainer: pl.Trainer, loggers: list[Any]) -> Iterator[None]:
    """A `with` in which the Trainer has these loggers and no callbacks; its stage and metrics are restored.

    A progress bar is kept, without its hooks, because rich draws it from a thread of its own.
    """
    before = trainer.loggers, trainer.callbacks, trainer.state.stage  # type: ignore[attr-defined]
    connector = trainer._logger_connector
    metrics = {name: dict(getattr(connector, name)) for name in _METRICS}
    bar = trainer.progress_bar_callback
    trainer.loggers, trainer.callbacks = loggers, [] if bar is None else [_without_hooks(bar)]  # type: ignore[attr-defined]
    for name in _METRICS:
        getattr(connector, name).clear()
    try:
        yield
    finally:
        trainer.loggers, trainer.callbacks, trainer.state.stage = before  # type: ignore[attr-defined]
        for name, values in metrics.items():
            getattr(connector, name).clear()
            getattr(connector, name).update(values)


def _without_hooks(bar: Any) -> Any:
    """A progress bar with the same state, whose hooks do nothing."""
    kind = type(bar)
    hooks = {name: lambda self, *args, **kwargs: None for name in dir(kind) if name.startswith("on_")}
    silent: Any = object.__new__(type(kind.__name__, (kind,), hooks))
    silent.__dict__ = vars(bar)
    return silent


_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def run_validation(trainer: pl.Trainer, name: str | None = None, batches: int | None = None) -> ValidationMetrics:
    """The metrics of one pass over the validation data; empty without such data.

    They are logged to the sibling runs ``name``. Callbacks are not called: early stopping, checkpoints and progress
    bars get only the user's own validation. Metrics with a state, such as the best value so far, are reset for this
    pass and restored afterwards.

    Args:
        trainer: in a ``fit`` or a ``validate``.
        name: of the sibling runs; ``None`` logs nothing.
        batches: maximum number of batches of each loader; ``None`` is all.
    """
    fit = fitting(trainer)
    if fit and not trainer.enable_validation:
        return ValidationMetrics({}, {})
    loop: Any = trainer.fit_loop.epoch_loop.val_loop if fit else trainer.validate_loop
    runs = [] if name is None else [sibling(trainer, logger, name) for logger in trainer.loggers]
    with preserved(trainer.lightning_module, reset=True), isolated(trainer, runs), _restored(loop):
        trainer.state.stage = of_package(trainer, "trainer.states", "RunningStage").VALIDATING
        try:
            with _limited(loop, batches):
                outputs = loop.run()
        finally:
            for run in runs:
                run.finalize("success")
        logged = averages(trainer, {key: value for output in outputs for key, value in output.items()})
        monitored = logged | averages(trainer, trainer.callback_metrics)
    for logger, run in zip(trainer.loggers, runs, strict=False):
        if is_a(run, "DummyLogger") and logged:
            logger.log_metrics({f"{name}/{key}": value for key, value in logged.items()}, trainer.global_step)
    return ValidationMetrics(logged, monitored)


@contextmanager
def _restored(loop: Any) -> Iterator[None]:
    """A `with` in which a loop prints nothing, and after which its state is restored."""
    before = loop.verbose, dict(loop._module_mode.mode), copy.deepcopy(loop.batch_progress.state_dict())
    loop.verbose = False
    try:
        yield
    finally:
        loop.verbose, loop._module_mode.mode = before[:2]
        loop.batch_progress.load_state_dict(before[2])


@contextmanager
def _limited(loop: Any, batches: int | None) -> Iterator[None]:
    """A `with` in which the loop of a ``fit`` runs over a limited number of batches of each loader."""
    if batches is None:
        yield
        return
    loop.setup_data()
    limits = loop._max_batches
    loop._max_batches = [min(batches, limit) for limit in limits]
    try:
        yield
    finally:
        loop._max_batches = limits


def averages(trainer: pl.Trainer, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The metrics averaged over all processes; those logged with ``sync_dist`` are equal in all of them."""
    return {key: float(trainer.strategy.reduce(value.clone(), reduce_op="mean")) for key, value in metrics.items()}


def restart_validation(trainer: pl.Trainer) -> None:
    """Restart a ``validate`` whose data were read in its start hook."""
    trainer.validate_loop.reset()
    trainer.lightning_module.on_validation_model_eval()
