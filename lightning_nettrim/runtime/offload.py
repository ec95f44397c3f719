"""Offloading: tensors are stored on their device, in host memory or on disk until they are used."""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load, save_file
from torch import Tensor

OFFLOAD_TARGETS = ("device", "cpu", "disk")
"""Where tensors can be stored."""

RELEASE_EVERY = 2**25
"""Number of bytes stored or read from files after which freed memory is returned to the system."""

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def release_freed_memory() -> None:
    """Return freed host memory to the operating system, which glibc does not do on its own.

    When tensors of similar sizes are allocated and freed while others are kept, the heap fragments: the freed blocks
    are slightly too small for the next aligned allocation.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


class TensorStore:
    """Stores tensors until they are used; tensors that exceed the capacity are written to disk.

    Files are written to a folder of their own in the system's temporary directory. A file is removed when its
    `StoredTensors` object is garbage-collected.

    Args:
        offload: ``"device"`` keeps tensors where they are, ``"cpu"`` moves them to host memory, ``"disk"`` writes them
            to files.
        capacity: maximum number of bytes of all tensors that are kept in memory.

    Attributes:
        size: number of bytes of the tensors that are kept in memory.

    Raises:
        ValueError: if ``offload`` is not one of `OFFLOAD_TARGETS`.
    """

    def __init__(self, offload: str = "cpu", capacity: float = float("inf")) -> None:
        if offload not in OFFLOAD_TARGETS:
            raise ValueError(f"offload: expected {' or '.join(map(repr, OFFLOAD_TARGETS))}, got {offload!r}")
        self.offload, self.capacity, self.size = offload, capacity, 0
        self._folder: Path | None = None
        self._num_files = self._unreleased = 0

    def put(self, tensors: Sequence[Tensor]) -> StoredTensors:
        """Store tensors for as long as the returned object exists."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        self._record_transfer(size)
        if self.offload == "disk" or self.size + size > self.capacity:
            return StoredTensors([], (self._write(tensors), self))
        if self.offload == "cpu":
            tensors = [t.cpu() for t in tensors]
        stored = StoredTensors([t.detach() for t in tensors])
        self.size += size
        weakref.finalize(stored, self._reduce_size, size)
        return stored

    def _record_transfer(self, size: int) -> None:
        """Count transferred bytes and, every `RELEASE_EVERY` bytes, return freed memory to the system."""
        self._unreleased += size
        if self._unreleased > RELEASE_EVERY:
            release_freed_memory()
            self._unreleased = 0

    def _reduce_size(self, size: int) -> None:
        self.size -= size

    def _write(self, tensors: Sequence[Tensor]) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="nettrim-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._num_files += 1
        path = self._folder / f"{self._num_files}.safetensors"
        save_file({str(i): t.detach().cpu().contiguous() for i, t in enumerate(tensors)}, path)
        return path


class StoredTensors:
    """Tensors in a `TensorStore`.

    Args:
        tensors: the tensors; empty if they are in a file.
        file: path of the file, which is removed with this object, and the store, which must exist as long because its
            folder is removed with it; ``None`` if the tensors are in memory.
    """

    def __init__(self, tensors: list[Tensor], file: tuple[Path, TensorStore] | None = None) -> None:
        self._tensors, self._file = tensors, file
        if file is not None:
            weakref.finalize(self, file[0].unlink, missing_ok=True)

    def load(self) -> list[Tensor]:
        """The tensors; those in a file are read into new memory on the CPU."""
        if self._file is None:
            return self._tensors
        path, store = self._file
        content = path.read_bytes()
        store._record_transfer(len(content))
        tensors = load(content)
        return [tensors[str(i)] for i in range(len(tensors))]
