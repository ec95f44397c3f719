"""Calibration batches from the loaders of a Trainer, within its limits, as its steps would get them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_nettrim.callbacks.lightning_package import fitting, of_package, overridden
from lightning_nettrim.callbacks.steps import LoadedBatch
from lightning_nettrim.callbacks.strategy import share_of_batches


def calibration_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, data: str, limit: int
) -> Iterator[LoadedBatch]:
    """The batches of the training or the validation data, on the device.

    Args:
        trainer: in a ``fit`` or a ``validate``.
        pl_module: the network.
        data: ``"train"`` or ``"val"``.
        limit: number of batches of a loader without an end.
    """
    for batch, index in _batches(trainer, pl_module, data, limit):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=index)
        yield LoadedBatch(trainer.strategy.batch_to_device(batch, dataloader_idx=index), index)


def _batches(trainer: pl.Trainer, pl_module: pl.LightningModule, data: str, limit: int) -> Iterator[tuple[Any, int]]:
    """The batches of this process, each with the index of its loader."""
    fit = fitting(trainer)
    if data == "train" and fit:
        seen = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        count = _finite(trainer.num_training_batches, seen)
        yield from _combined(trainer.fit_loop._combined_loader, _share(trainer, count))
        return
    if data == "train":
        source = trainer.datamodule or pl_module  # type: ignore[attr-defined]
        if overridden(source, "train_dataloader"):
            if source is not pl_module:
                source.setup("fit")
            loaders = source.train_dataloader()
            combined_loader = of_package(trainer, "utilities", "CombinedLoader")
            combined = loaders if isinstance(loaders, combined_loader) else combined_loader(loaders, "max_size_cycle")
            rank, count = trainer.global_rank, trainer.world_size  # Lightning has not divided these among processes
            yield from _combined(combined, slice(rank, _train_limit(trainer, combined, limit), count))
            return
        rank_zero_warn(
            "NetTrim: expected a train_dataloader to calibrate on in this validate, got none: calibrating on the"
            " validation data. Pass a datamodule with one, or set calibration='val'"
        )
    loop = trainer.fit_loop.epoch_loop.val_loop if fit else trainer.validate_loop
    if fit:
        loop.setup_data()
    assert loop._combined_loader is not None  # not `trainer.val_dataloaders`, which are those of an earlier fit
    for index, (loader, most) in enumerate(zip(loop._combined_loader.flattened, loop.max_batches, strict=True)):
        share = _share(trainer, _finite(most, limit))
        for batch in islice(loader, share.start, share.stop, share.step):
            yield batch, index


def _share(trainer: pl.Trainer, count: int) -> slice:
    """The batches of this process among ``count``; all of them, if not every process would get one."""
    first, step = share_of_batches(trainer)
    return slice(first, count, step) if count >= step else slice(0, count, 1)


def _combined(loader: Any, share: slice) -> Iterator[tuple[Any, int]]:
    """The batches of a combined loader as ``training_step`` gets them, each with the index of its loader."""
    combined: Iterable[tuple[Any, int, int]] = islice(loader, share.start, share.stop, share.step)
    return ((batch, dataloader_idx) for batch, _, dataloader_idx in combined)


def _train_limit(trainer: pl.Trainer, loader: Any, limit: int) -> int:
    """Number of batches of a train loader for all processes, by the Trainer's limit, which is per process."""
    if isinstance(trainer.limit_train_batches, int):
        return trainer.limit_train_batches * trainer.world_size
    try:
        iter(loader)  # a combined loader has a length only after this
        length = len(loader)
    except (TypeError, NotImplementedError):
        return limit * trainer.world_size
    return max(1, int((trainer.limit_train_batches or 1.0) * length))


def _finite(limit: float, default: int) -> int:
    """The limit, or a default if it is infinite."""
    return default if limit == float("inf") else int(limit)
