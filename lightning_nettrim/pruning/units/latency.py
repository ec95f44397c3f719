"""Numbers of units within a latency that is measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.nested import common_length
from lightning_nettrim.pruning.session import CalibrationSession
from lightning_nettrim.pruning.units.groups import UnitGroup, channels_of_units
from lightning_nettrim.pruning.units.surgery import without_channels

MIN_SECONDS = 0.3
"""Time of a measurement of the latency, of which the median run counts."""

TRIALS, SUFFICIENT = 8, 0.97
"""Maximum number of measured networks, and the fraction of the latency from which on no other one is measured."""


def keep_within_latency(
    session: CalibrationSession,
    groups: Mapping[str, UnitGroup],
    keep: Callable[[float], dict[str, int]],
    fewest: tuple[dict[str, int], float],
    budget: tuple[int, float],
) -> dict[str, int]:
    """Numbers of units with which a forward pass takes at most a fraction of its time, by bisection.

    Networks without some units, whichever, are run in place of the trained one, in turns with it.

    Args:
        session: the trained model with its calibration data.
        groups: the groups of units.
        keep: numbers of units within a fraction of the multiply-accumulates.
        fewest: the smallest numbers of units, and the fraction of the multiply-accumulates that they leave.
        budget: batch size, and the fraction of the trained network's time.

    Raises:
        ValueError: if batches have no batch dimension, or if the network with the fewest units takes longer.
    """
    size, fraction = budget
    batch = session.activations.calibration_set.without_cache()[0]
    if common_length(batch.batch) is None:
        raise ValueError(
            "latency: expected batches whose tensors have a common first dimension, got others: limit macs instead"
        )
    batch = batch.repeated(size)

    def ratio(kept: Mapping[str, int]) -> float:
        masks = {name: torch.arange(group.size) < kept[name] for name, group in groups.items()}
        before = milliseconds(session.model, batch)
        with without_channels(session.model, channels_of_units(groups, masks)):
            after = milliseconds(session.model, batch)
        return session.processes.mean(after / before)

    session.run.progress.activity = "measuring the latency"
    (best, low), high = fewest, 1.0
    if (measured := ratio(best)) > fraction:
        raise ValueError(
            f"latency: expected at least {measured:.2f}, which the network with the fewest units takes, got"
            f" {fraction:g}: choose more, or ignore fewer layers"
        )
    for trial in range(TRIALS):
        session.run.progress.report("measuring the latency", trial / TRIALS)
        macs = (low + high) / 2
        kept = keep(macs)
        found = ratio(kept)
        if found > fraction:
            high = macs
            continue
        low, best, measured = macs, kept, found
        if found >= SUFFICIENT * fraction:
            break
    session.run.notes.append(f"latency: {measured:.2f} of the trained network's, at batch size {size}")
    return best


def milliseconds(model: nn.Module, batch: CalibrationBatch) -> float:
    """The median time of a forward pass."""
    from torch.utils.benchmark import Timer  # it logs a message when it is imported on a machine without an accelerator

    with evaluation_mode(model):
        timer = Timer("batch(model)", globals={"batch": batch, "model": model}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=MIN_SECONDS).median * 1e3
