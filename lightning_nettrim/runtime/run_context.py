"""Environment of a run: processes, memory, storage, resuming, progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_nettrim.runtime.fingerprint import fingerprint
from lightning_nettrim.runtime.memory import MemoryMeter
from lightning_nettrim.runtime.offload import TensorStore
from lightning_nettrim.runtime.progress import Progress
from lightning_nettrim.runtime.resume import ResumeStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RunContext:
    """Environment of a run, which is independent of what is computed.

    Attributes:
        processes: the processes that take part.
        store: store of tensors that are used again later.
        available: number of bytes that one recording or one solve may take.
        meter: meter of the peak memory usage; ``None`` measures nothing.
        resume: results of finished steps on disk; ``None`` keeps none.
        progress: progress of the run.
        notes: warnings for the report, in order.
        cache: results of this run that are reused, by fingerprint.
    """

    processes: ProcessGroup = SINGLE_PROCESS
    store: TensorStore = field(default_factory=lambda: TensorStore("device"))
    available: float = float("inf")
    meter: MemoryMeter | None = None
    resume: ResumeStore | None = None
    progress: Progress = field(default_factory=Progress)
    notes: list[str] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Log a warning and keep it for the report."""
        self.notes.append(text)
        log.warning("NetTrim: %s", text)

    def cached(
        self, name: str, key: str, compute: Callable[[], tuple[Mapping[str, Tensor], Any]]
    ) -> tuple[dict[str, Tensor], Any]:
        """Compute a result once per name and key, also across interrupted runs.

        Args:
            name: name of the result.
            key: fingerprint of everything it is computed from.
            compute: function that returns tensors by name, and values that can be written as JSON.

        Returns:
            The tensors and the values, from the cache, from disk, or computed.
        """
        entry_key = fingerprint(name, key)
        if entry_key not in self.cache:
            entry = None if self.resume is None else self.resume.read(name, key)
            tensors, metadata = compute() if entry is None else entry
            if entry is None and self.resume is not None:
                self.resume.write(name, key, tensors, metadata)
            self.cache[entry_key] = list(tensors), self.store.put(list(tensors.values())), metadata
        names, stored, metadata = self.cache[entry_key]
        return dict(zip(names, stored.load(), strict=True)), metadata
