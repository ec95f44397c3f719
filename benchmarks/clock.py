"""Wall-clock time of work on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Clock:
    """Wall-clock seconds since the object was created, without the time in which it was paused.

    Args:
        device: on CUDA, every reading waits until the work queued on the device is finished.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._start = 0.0
        self._start = self.read()

    def read(self) -> float:
        """Elapsed seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter() - self._start

    @contextmanager
    def paused(self) -> Iterator[float]:
        """A `with` whose body is not timed; its value is the elapsed seconds."""
        seconds = self.read()
        yield seconds
        self._start += self.read() - seconds
