"""Compare: validation passes of one network beside another, each into its own run of the user's loggers."""

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
    """The metrics of one pass over the validation data: those that were logged, and all that a monitor can name."""

    logged: dict[str, float]
    monitored: dict[str, float]


def sibling(trainer: pl.Trainer, logger: Logger, name: str) -> Any:
    """A logger of the same kind in the folder ``name`` of this logger's run; a mute one for kinds without folders."""
    for cls in type(logger).__mro__:
        if cls.__name__ == "TensorBoardLogger":
            return cls(logger.log_dir, name="", version=name, default_hp_metric=False)
        if cls.__name__ == "CSVLogger":
            return cls(logger.log_dir, name="", version=name)
    return dummy_logger(trainer)


@contextmanager
def apart(trainer: pl.Trainer, loggers: list[Any]) -> Iterator[None]:
    """A `with` in which the trainer has these loggers and no callbacks; its stage and its metrics are put back.

    A progress bar stays, without its hooks: rich draws it from a thread of its own, which asks the trainer for it.
    """
    kept = trainer.loggers, trainer.callbacks, trainer.state.stage  # type: ignore[attr-defined]
    connector = trainer._logger_connector
    metrics = {name: dict(getattr(connector, name)) for name in _METRICS}
    bar = trainer.progress_bar_callback
    trainer.loggers, trainer.callbacks = loggers, [] if bar is None else [_without_hooks(bar)]  # type: ignore[attr-defined]
    for name in _METRICS:
        getattr(connector, name).clear()
    try:
        yield
    finally:
        trainer.loggers, trainer.callbacks, trainer.state.stage = kept  # type: ignore[attr-defined]
        for name, values in metrics.items():
            getattr(connector, name).clear()
            getattr(connector, name).update(values)


def _without_hooks(bar: Any) -> Any:
    """A progress bar with the same state and no hooks."""
    kind = type(bar)
    hooks = {name: lambda self, *args, **kwargs: None for name in dir(kind) if name.startswith("on_")}
    silent: Any = object.__new__(type(kind.__name__, (kind,), hooks))
    silent.__dict__ = vars(bar)
    return silent


_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def run_validation(trainer: pl.Trainer, name: str | None = None, batches: int | None = None) -> ValidationMetrics:
    """Metrics of one pass over the validation data, empty without such data.

    They are logged into the sibling runs ``name``, or nowhere if there is no name. Callbacks take no part: early
    stopping, checkpoints and progress bars see only the user's own validation. Metrics with a state, such as the best
    value so far, start anew and are as before afterwards.

    Args:
        trainer: in a ``fit`` or a ``validate``.
        name: of the sibling runs.
        batches: of each loader at most; all of them if not given.
    """
    fit = fitting(trainer)
    if fit and not trainer.enable_validation:
        return ValidationMetrics({}, {})
    loop: Any = trainer.fit_loop.epoch_loop.val_loop if fit else trainer.validate_loop
    runs = [] if name is None else [sibling(trainer, logger, name) for logger in trainer.loggers]
    with preserved(trainer.lightning_module, reset=True), apart(trainer, runs), _as_before(loop):
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
def _as_before(loop: Any) -> Iterator[None]:
    """A `with` in which a loop prints nothing, and after which it is as before."""
    kept = loop.verbose, dict(loop._module_mode.mode), copy.deepcopy(loop.batch_progress.state_dict())
    loop.verbose = False
    try:
        yield
    finally:
        loop.verbose, loop._module_mode.mode = kept[:2]
        loop.batch_progress.load_state_dict(kept[2])


@contextmanager
def _limited(loop: Any, batches: int | None) -> Iterator[None]:
    """A `with` in which the loop of a ``fit`` runs over so many batches of each loader at most."""
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
    """Metrics over all processes; those that were logged with ``sync_dist`` are that already."""
    return {key: float(trainer.strategy.reduce(value.clone(), reduce_op="mean")) for key, value in metrics.items()}


def restart_validation(trainer: pl.Trainer) -> None:
    """Let a ``validate`` in whose start hook its data were read begin anew."""
    trainer.validate_loop.reset()
    trainer.lightning_module.on_validation_model_eval()
