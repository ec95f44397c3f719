"""Strategies of Lightning: which ones are supported, and which processes get the same batches."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_nettrim.callbacks.lightning_package import is_a


def check_strategy(trainer: pl.Trainer) -> None:
    """Check that the strategy of a Trainer is supported.

    How ``ModelParallelStrategy`` divides the network is only known when it is configured; see `check_sharding`.

    Raises:
        MisconfigurationException: naming the strategy.
    """
    kind = type(trainer.strategy).__name__
    if not (is_a(trainer.strategy, "SingleDeviceStrategy") or kind in ("DDPStrategy", "ModelParallelStrategy")):
        raise MisconfigurationException(
            f"NetTrim: expected a single device, DDP or ModelParallelStrategy (FSDP2), got {kind}: train with it, then"
            " prune with `Trainer(devices=1).validate(model, ckpt_path=...)`; or set allow_untested_strategy"
        )


def is_distributed(trainer: pl.Trainer) -> bool:
    """Whether several processes prune a network together."""
    return is_a(trainer.strategy, "DDPStrategy", "ModelParallelStrategy")


def share_of_batches(trainer: pl.Trainer) -> tuple[int, int]:
    """Which of the batches of its loaders a process calibrates on: every n-th from the i-th on, as ``(i, n)``.

    Lightning gives the same batches to all processes of a tensor-parallel dimension, which is the only one of a
    ``ModelParallelStrategy`` without arguments, whatever is done along it.
    """
    if not is_a(trainer.strategy, "ModelParallelStrategy"):
        return 0, 1
    mesh = trainer.strategy.device_mesh["tensor_parallel"]  # type: ignore[attr-defined]
    return mesh.get_local_rank(), mesh.size()
