"""The monitored metric of a search within a drop."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_nettrim.callbacks.validation import ValidationMetrics, run_validation
from lightning_nettrim.layers import masking


def monitored_value(metrics: ValidationMetrics, monitor: str) -> float:
    """The monitored metric of a validation.

    Raises:
        MisconfigurationException: if there is no such metric.
    """
    if monitor not in metrics.monitored:
        raise MisconfigurationException(
            "NetTrim: monitor: expected one of the metrics that the module logs in its validation,"
            f" {', '.join(metrics.monitored) or '(none)'}, got {monitor!r}"
        )
    return metrics.monitored[monitor]


def check_monitor(trainer: pl.Trainer, pl_module: pl.LightningModule, monitor: str, weights: list[str]) -> None:
    """Check that a metric differs between the trained network and one whose weights are zero.

    Args:
        trainer: in a ``fit`` or a ``validate``.
        pl_module: the trained network.
        monitor: name of the metric.
        weights: names of the parameters that are set to zero.

    Raises:
        MisconfigurationException: if it does not.
    """
    trained = monitored_value(run_validation(trainer), monitor)
    before = masking.clone(pl_module, weights)
    try:
        masking.assign(pl_module, {name: torch.zeros_like(weight) for name, weight in before.items()})
        destroyed = monitored_value(run_validation(trainer), monitor)
    finally:
        masking.assign(pl_module, before)
    if trained == destroyed:
        raise MisconfigurationException(
            f"NetTrim: monitor: expected a metric that can fall, got {monitor!r}, which is {trained:g} for the trained"
            " network and for one with zero weights, as the best value so far is: monitor the metric itself"
        )
