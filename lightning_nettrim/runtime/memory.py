"""Available memory, peak memory usage, and retries after running out of memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, DistributedOutOfMemory, ProcessGroup, is_out_of_memory
from lightning_nettrim.runtime.offload import release_freed_memory

S = TypeVar("S")
T = TypeVar("T")

GIB = 2**30

DEFAULT_FRACTION = 0.5
"""Default fraction of the memory available at the beginning of a run that may be used."""


def available_memory(device: torch.device) -> int:
    """Number of bytes that can currently be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _kernel_fields("/proc/meminfo").get("MemAvailable")
    if available is not None:
        return available
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * GIB


class MemoryMeter:
    """Peak memory usage above the usage at the time of construction.

    On CUDA it is the memory allocated by tensors on the device, from PyTorch's statistics, whose peak is reset.
    Elsewhere it is the resident memory of the process, which is available on Linux only and otherwise 0.

    Args:
        device: device whose memory is measured.

    Attributes:
        peak: largest result of `read_peak` so far, in bytes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.peak = device, 0
        self._base = self._current()
        self._reset_peak()

    def read_peak(self) -> int:
        """Peak usage since the last call, in bytes above the usage at the beginning; starts a new measurement."""
        if self._device.type == "cuda":
            highest = torch.cuda.max_memory_allocated(self._device)
        else:
            highest = _kernel_fields("/proc/self/status").get("VmHWM", 0)
        release_freed_memory()
        self._reset_peak()
        above_base = max(highest - self._base, 0)
        self.peak = max(self.peak, above_base)
        return above_base

    def _current(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _kernel_fields("/proc/self/status").get("VmRSS", 0)

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                return


def _kernel_fields(path: str) -> dict[str, int]:
    """``{name: bytes}`` from the lines ``name: number kB`` of a file of the Linux kernel; empty if there is none."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    split_lines = [line.replace(":", "").split() for line in lines]
    return {words[0]: 1024 * int(words[1]) for words in split_lines if len(words) == 3 and words[2] == "kB"}


def retry_with_less(
    attempt: Callable[[S], T], state: S, reduce: Callable[[S], S], processes: ProcessGroup = SINGLE_PROCESS
) -> tuple[T, S]:
    """Call a function with a state, which is reduced up to three times if memory runs out.

    With several processes, a call is repeated only if the failure is known to all of them (`DistributedOutOfMemory`).

    Args:
        attempt: function of the state.
        state: initial state.
        reduce: function that returns, for a state, one that needs less memory.
        processes: processes that make the call together.

    Returns:
        The result of the successful call and the state it was called with.
    """
    for _ in range(3):
        try:
            return attempt(state), state
        except Exception as error:
            if not is_out_of_memory(error) or (processes.count > 1 and not isinstance(error, DistributedOutOfMemory)):
                raise
        state = reduce(state)  # outside the handler, so that the exception's tensors are freed
    return attempt(state), state
