"""The callback `CoresetPruning`: `NetTrim` with data-independent coresets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_nettrim.callbacks.nettrim import NetTrim
from lightning_nettrim.pruning.units.coreset import Coreset


class CoresetPruning(NetTrim):
    """Prunes whole neurons and channels by coresets, without calibration data.

    A `NetTrim` with the pattern ``units`` and the selection `Coreset`. Layers that read removed units are refitted on
    random inputs, or reweighted, and BatchNorm statistics stay as they are. Of the batches only the shapes count and,
    unless the coreset has a ``beta``, the largest norm of each layer's inputs; the reported errors are measured on
    them. Like `NetTrim`, it prunes after ``fit`` or before a ``validate``, compares both networks, and writes
    ``compact.safetensors``.

    Args:
        sparsity: fraction of the units that is removed.
        macs: fraction of the network's multiply-accumulates that is left at most, once compacted.
        parameters: fraction of the network's parameters that is left at most, once compacted.
        latency: fraction of the time of a forward pass that is left at most, once compacted, as measured on this
            machine at the batch size ``latency_batch_size``.
        max_drop: maximum drop of the metric; the fewest units within it are searched by trials.
        monitor: name of the validation metric that ``max_drop`` is about.
        mode: whether a larger (``"max"``) or a smaller (``"min"``) metric is better.
        coreset: how units are chosen; its ``count`` or ``error`` may take the place of a budget.
        refit: refit the layers that read removed units on random inputs; otherwise a sample is reweighted.
        round_to: multiples of so many units are kept.
        latency_batch_size: batch size at which ``latency`` is measured.
        targets: layers whose units may be removed, by names, globs, ``re:`` patterns or class names.
        ignore: layers to leave as they are, by the same keys.
        num_samples: number of random inputs of each layer.
        calibration: the data whose batches are used, ``train`` or ``val``.
        compare: validate the dense and the pruned network, logged to two sibling runs of the logger.
        save: write ``pruned.ckpt``, ``compact.safetensors`` and ``report.json``.

    Raises:
        MisconfigurationException: naming the option, what was expected and what was given.

    References:
        Mussay, Osadchy, Braverman, Zhou, Feldman, "Data-Independent Neural Pruning via Coresets", ICLR 2020.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        macs: float | None = None,
        parameters: float | None = None,
        latency: float | None = None,
        max_drop: float | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        coreset: Coreset | None = None,
        refit: bool = True,
        round_to: int = 1,
        latency_batch_size: int = 1,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
        num_samples: int = 4096,
        calibration: Literal["train", "val"] = "train",
        compare: bool = True,
        save: bool = True,
    ) -> None:
        if coreset is not None and not isinstance(coreset, Coreset):
            raise MisconfigurationException(f"CoresetPruning: coreset: expected a Coreset, got {coreset!r}")
        select = replace(coreset or Coreset(), inputs="synthetic")
        super().__init__(
            sparsity=sparsity,
            macs=macs,
            parameters=parameters,
            latency=latency,
            max_drop=max_drop,
            monitor=monitor,
            mode=mode,
            pattern="units",
            select=select,
            scheme="parallel",
            refit=refit,
            round_to=round_to,
            latency_batch_size=latency_batch_size,
            targets=targets,
            ignore=ignore,
            num_samples=num_samples,
            recalibrate_batchnorm=False,
            calibration=calibration,
            compare=compare,
            save=save,
        )
