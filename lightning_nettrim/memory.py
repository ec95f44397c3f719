"""Memory: what is free, what was used at most, and how much of a layer fits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from lightning_nettrim.layers import Layer
from lightning_nettrim.ranks import ALONE, Exhausted, Ranks, is_out_of_memory
from lightning_nettrim.shelf import release

T = TypeVar("T")

GIB = 2**30

FRACTION = 0.5
"""Of the memory that is free at the beginning: what may be used if nothing else is said."""

LEAST_ROWS = 256
"""Of a layer: fewer are not recorded, however little memory there is."""


def free(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = _fields("/proc/meminfo").get("MemAvailable")
    if known is not None:
        return known
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * GIB


class Meter:
    """The largest amount of memory above what was in use at the beginning: of the device, or of the whole process.

    On CUDA it is what tensors took, by torch's own count, whose peak is reset; elsewhere it is the resident memory, by
    the kernel's own count on Linux; 0 where nobody counts.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.peak = device, 0
        self._base = self._now()
        self._reset()

    def lap(self) -> int:
        """Bytes above those at the beginning, at most since the last lap; what is free does not count in the next."""
        if self._device.type == "cuda":
            high = torch.cuda.max_memory_allocated(self._device)
        else:
            high = _fields("/proc/self/status").get("VmHWM", 0)
        release()
        self._reset()
        lap = max(high - self._base, 0)
        self.peak = max(self.peak, lap)
        return lap

    def _now(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _fields("/proc/self/status").get("VmRSS", 0)

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                return


def _fields(path: str) -> dict[str, int]:
    """The lines ``name: number kB`` of a file of the kernel, in bytes; none where there is no such file."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    words = [line.replace(":", "").split() for line in lines]
    return {word[0]: 1024 * int(word[1]) for word in words if len(word) == 3 and word[2] == "kB"}


def to_record(layer: Layer, rows: int, inputs: bool) -> int:
    """Bytes that the recording of a layer takes: a reservoir with up to twice the rows, and their copy.

    Of its inputs it is what it sees, what the layer before answers and what a residual sum adds; else what it answers
    and what a residual sum adds.
    """
    columns = layer.groups * (2 * layer.inputs + layer.outputs if inputs else 2 * layer.outputs)
    return 3 * rows * columns * layer.parameter.element_size()


def to_solve(layer: Layer, rows: int) -> int:
    """Bytes that a solve takes, about: of the inputs, of the responses, of the Gram matrix and of the weights."""
    N, M = layer.inputs + 1, layer.outputs
    return 4 * layer.groups * (3 * rows * N + 10 * rows * M + 12 * N * min(N, rows) + 10 * N * M)


def beside(layers: Mapping[str, Layer], rows: Mapping[str, int], room: float, spectra: bool) -> float:
    """Bytes that are held all the time: three copies of the weights, and what waits in a room in memory.

    Those are the responses and, if all layers' are kept, the spectra.
    """
    weights = sum(layer.parameter.numel() * layer.parameter.element_size() for layer in layers.values())
    waiting = sum(4 * rows[name] * layer.groups * layer.outputs for name, layer in layers.items())
    if spectra:
        waiting += sum(4 * a.groups * a.inputs * min(a.inputs, rows[name]) for name, a in layers.items())
    return 3 * weights + min(waiting, room)


def rows_within(layer: Layer, rows: int, room: float) -> int:
    """As many rows of a layer, ``rows`` at most and LEAST_ROWS at least, as can be recorded and solved in a room."""

    def needed(count: int) -> int:
        return max(to_record(layer, count, True), to_record(layer, count, False), to_solve(layer, count))

    while rows > LEAST_ROWS and needed(rows) > room:
        rows = max(rows // 2, LEAST_ROWS)
    return rows


def passes(layers: Mapping[str, Layer], rows: Mapping[str, int], room: float) -> list[list[str]]:
    """The layers in as few groups as can be recorded in so many bytes each, in order; only their outputs."""
    groups: list[list[str]] = []
    left = 0.0
    for name, layer in layers.items():
        size = to_record(layer, rows[name], inputs=False)
        if not groups or size > left:
            groups.append([])
            left = room
        groups[-1].append(name)
        left -= size
    return groups


def with_less(attempt: Callable[[], T], less: Callable[[], object], ranks: Ranks = ALONE) -> T:
    """What an attempt returns; where memory does not suffice it is made three times more, each time with less.

    Of several processes all must know: others would wait in an exchange.
    """
    for _ in range(3):
        try:
            return attempt()
        except Exception as error:
            if not is_out_of_memory(error) or (ranks.count > 1 and not isinstance(error, Exhausted)):
                raise
        less()  # not while the exception holds what the attempt has allocated
    return attempt()
