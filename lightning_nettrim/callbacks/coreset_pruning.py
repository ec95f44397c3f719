"""The callback `CoresetPruning`: `NetTrim` with data-independent coresets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
        coreset: how units are chosen; its ``count`` or ``error`` may take the place of a budget.
        num_samples: number of random inputs of each layer.
        **options: further options of `NetTrim`: a budget (``sparsity``, ``macs``, ``parameters``, ``latency`` or
            ``max_drop``), ``refit=False`` to reweight samples in place of a refit, and what is independent of the
            method.

    Raises:
        MisconfigurationException: naming the option, what was expected and what was given.

    References:
        Mussay, Osadchy, Braverman, Zhou, Feldman, "Data-Independent Neural Pruning via Coresets", ICLR 2020.
    """

    def __init__(self, coreset: Coreset | None = None, num_samples: int = 4096, **options: Any) -> None:
        if coreset is not None and not isinstance(coreset, Coreset):
            raise MisconfigurationException(f"CoresetPruning: coreset: expected a Coreset, got {coreset!r}")
        super().__init__(
            pattern="units",
            select=replace(coreset or Coreset(), inputs="synthetic"),
            scheme="parallel",
            recalibrate_batchnorm=False,
            num_samples=num_samples,
            **options,
        )
