"""The calibration set: stored batches, loaded one by one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import overload

from lightning_nettrim.calibration.batch import CalibrationBatch, Forward, call
from lightning_nettrim.calibration.output_cache import OutputCache
from lightning_nettrim.calibration.stored_batch import StoredBatch, StoredPair
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup


class CalibrationSet(Sequence[CalibrationBatch]):
    """The calibration set: a sequence of batches, each of which is loaded from its store when it is accessed.

    Args:
        batches: the stored batches.
        inputs: number of inputs in all batches.
        forward: function that runs a batch through a model.
        processes: processes that run every forward pass together, for which they must have equally many batches: those
            of a process with fewer are split, and if that is not possible, the last ones of the others are dropped.
        cache: outputs of layers that are kept between forward passes; ``None`` keeps none.
    """

    def __init__(
        self,
        batches: Sequence[StoredBatch | StoredPair],
        inputs: int,
        forward: Forward = call,
        processes: ProcessGroup = SINGLE_PROCESS,
        cache: OutputCache | None = None,
    ) -> None:
        self._forward, self._processes, self.inputs, self.cache = forward, processes, inputs, cache
        self._batches = _equally_many(list(batches), processes)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> CalibrationBatch: ...

    @overload
    def __getitem__(self, index: slice) -> CalibrationSet: ...

    def __getitem__(self, index: int | slice) -> CalibrationBatch | CalibrationSet:
        """One batch, loaded, or a calibration set of several batches, not loaded."""
        if isinstance(index, slice):
            batches = self._batches[index]
            inputs = max(1, self.inputs * len(batches) // max(len(self), 1))
            return CalibrationSet(batches, inputs, self._forward, self._processes, self.cache)
        stored = self._batches[index]
        reuse = nullcontext if self.cache is None else partial(self.cache.reused, stored)
        return CalibrationBatch(stored.load(), self._forward, seed=index, reuse=reuse)

    def without_cache(self) -> CalibrationSet:
        """The same batches, in whose forward passes every layer runs."""
        return CalibrationSet(self._batches, self.inputs, self._forward, self._processes)

    def first(self, inputs: int) -> CalibrationSet:
        """The calibration set of the first batches, with about the given number of inputs."""
        return self[: min(self._processes.gather(max(1, len(self) * inputs // self.inputs)))]

    def with_smaller_batches(self) -> CalibrationSet:
        """The same inputs in batches of half the size, where batches can be split."""
        halves: list[StoredBatch | StoredPair] = [half for batch in self._batches for half in batch.halves()]
        return CalibrationSet(halves, self.inputs, self._forward, self._processes, self.cache)

    def with_cache(self, cache: OutputCache) -> CalibrationSet:
        """The same batches, run with a cache of the outputs of layers."""
        return CalibrationSet(self._batches, self.inputs, self._forward, self._processes, cache)

    def run_together(self, processes: ProcessGroup) -> CalibrationSet:
        """The same inputs in as many batches as in the other processes, which run every forward pass with this one."""
        return CalibrationSet(self._batches, self.inputs, self._forward, processes, self.cache)

    def paired(self, values: Sequence[StoredBatch] | None, forward: Forward) -> CalibrationSet:
        """A calibration set of pairs ``(batch, value)``.

        Args:
            values: one for each batch; ``None`` is the value ``None`` for all.
            forward: function that runs a pair through a model.
        """
        all_values: Sequence[StoredBatch | None] = [None] * len(self) if values is None else values
        pairs = [StoredPair(*pair) for pair in zip(self._batches, all_values, strict=True)]
        return CalibrationSet(pairs, self.inputs, forward)

    def divided(self, batches: int) -> CalibrationSet:
        """The same inputs in at least so many batches, or in as many as possible."""
        divided = self
        while len(divided) < batches:
            smaller = divided.with_smaller_batches()
            if len(smaller) == len(divided):
                break
            divided = smaller
        return divided


def _equally_many(batches: list[StoredBatch | StoredPair], processes: ProcessGroup) -> list[StoredBatch | StoredPair]:
    """The batches, some of them split or dropped so that all processes have equally many."""
    if processes.count == 1:
        return batches
    most = max(processes.gather(len(batches)))
    while len(batches) < most:
        parts: list[StoredBatch | StoredPair] = []
        for i, batch in enumerate(batches):
            parts += batch.halves() if len(parts) + len(batches) - i < most else [batch]
        if len(parts) == len(batches):
            break
        batches = parts
    return batches[: min(processes.gather(len(batches)))]
