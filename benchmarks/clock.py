"""Seconds of work, read once the device has done it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Clock:
    """Wall-clock seconds since its making, less those for which it was stopped.

    Args:
        device: whose queue is waited for before a reading; on the CPU there is none.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._zero = 0.0
        self._zero = self.read()

    def read(self) -> float:
        """Seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter() - self._zero

    @contextmanager
    def stopped(self) -> Iterator[float]:
        """A reading, and work that is not counted."""
        seconds = self.read()
        yield seconds
        self._zero += self.read() - seconds
