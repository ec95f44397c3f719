"""Calibration: the batches of a trainer's own loaders, within its limits, as its steps would get them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


def calibration_batches(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, enough: int) -> Iterator[Any]:
    """The batches of ``stage``, ``"train"`` or ``"val"``, on the device; ``enough`` of an endless loader."""
    loaders, shares = _loaders(trainer, pl_module, stage, enough)
    for index, (loader, share) in enumerate(zip(loaders, shares, strict=True)):
        for batch in islice(loader, share.start, share.stop, share.step):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=index)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=index)


def _loaders(
    trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, enough: int
) -> tuple[list[Any], list[slice]]:
    """The loaders, and this process's share of each one's batches, within the trainer's limits."""
    fitting = trainer.state.fn == TrainerFn.FITTING
    if stage == "train" and fitting:
        seen = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        loaders = _flat(trainer.train_dataloader)
        return loaders, [slice(_finite(trainer.num_training_batches, seen))] * len(loaders)
    if stage == "train":
        source = trainer.datamodule or pl_module  # type: ignore[attr-defined]
        if is_overridden("train_dataloader", source):
            if source is not pl_module:
                source.setup("fit")
            loaders = _flat(source.train_dataloader())
            rank, count = trainer.global_rank, trainer.world_size  # by which Lightning has not divided these
            return loaders, [slice(rank, _limit(trainer, loader, enough), count) for loader in loaders]
        rank_zero_warn(
            "NetTrim: there is no train_dataloader to calibrate on in this validate: calibrating on the validation"
            " data. Pass a datamodule with one, or set calibration='val'"
        )
    loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    if fitting:
        loop.setup_data()
    assert loop._combined_loader is not None  # not `trainer.val_dataloaders`, which are those of an earlier fit
    return loop._combined_loader.flattened, [slice(_finite(limit, enough)) for limit in loop.max_batches]


def _limit(trainer: pl.Trainer, loader: Any, enough: int) -> int:
    """Batches of a train loader that the trainer's limit, which is each process's, allows to all of them."""
    limit, length = trainer.limit_train_batches, sized_len(loader)
    if isinstance(limit, int):
        return limit * trainer.world_size
    return enough * trainer.world_size if length is None else max(1, int(limit * length))


def _finite(limit: float, otherwise: int) -> int:
    """The limit, or what to take in its place where there is none."""
    return otherwise if limit == float("inf") else int(limit)


def _flat(loaders: Any) -> list[Any]:
    """All loaders of a collection, in order."""
    if loaders is None:
        return []
    if isinstance(loaders, dict):
        return list(chain.from_iterable(map(_flat, loaders.values())))
    if isinstance(loaders, list | tuple):
        return list(chain.from_iterable(map(_flat, loaders)))
    return [loaders]
