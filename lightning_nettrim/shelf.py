"""Shelf: tensors that wait until they are used, where they are, in the host's memory or on disk."""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

OFFLOAD = ("device", "cpu", "disk")
"""Where tensors can wait."""

RELEASE = 2**25
"""Bytes that come to a shelf or from its files between two times that freed memory is handed back."""

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def release() -> None:
    """Hand freed memory of the host back to the system, where the C library would keep it.

    Tensors of a size come and go while others stay; glibc leaves holes that the next, aligned, just does not fit.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


class Shelf:
    """Puts tensors where they are to wait; what does not fit in memory goes to disk.

    Files lie in a folder of their own in the system's folder for temporary files, and go with their tensors.

    Args:
        offload: ``"device"`` leaves tensors where they are, ``"cpu"`` takes them to the host's memory, ``"disk"``
            writes them to files.
        room: bytes of them in memory at most, together.

    Raises:
        ValueError: for another offload.
    """

    def __init__(self, offload: str = "cpu", room: float = float("inf")) -> None:
        if offload not in OFFLOAD:
            raise ValueError(f"offload: expected {', '.join(map(repr, OFFLOAD))}, got {offload!r}")
        self.offload, self.room, self.size = offload, room, 0
        self._folder: Path | None = None
        self._count = self._unreleased = 0

    def put(self, tensors: Sequence[Tensor]) -> Kept:
        """Keep some tensors; they are let go with what is returned."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        self.moved(size)
        if self.offload == "disk" or self.size + size > self.room:
            return Kept([], (self._write(tensors), self))
        if self.offload == "cpu":
            tensors = [t.cpu() for t in tensors]
        kept = Kept([t.detach() for t in tensors])
        self.size += size
        weakref.finalize(kept, self._lighter, size)
        return kept

    def moved(self, size: int) -> None:
        """Count bytes that come or go, and hand freed memory back from time to time."""
        self._unreleased += size
        if self._unreleased > RELEASE:
            release()
            self._unreleased = 0

    def _lighter(self, size: int) -> None:
        self.size -= size

    def _write(self, tensors: Sequence[Tensor]) -> Path:
        from safetensors.torch import save_file

        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="nettrim-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._count += 1
        path = self._folder / f"{self._count}.safetensors"
        save_file({str(i): t.detach().cpu().contiguous() for i, t in enumerate(tensors)}, path)
        return path


class Kept:
    """Tensors on a `Shelf`.

    Args:
        tensors: themselves, or none if they are in a file.
        file: its path, which is removed with this object, and the shelf whose folder has to be there as long.
    """

    def __init__(self, tensors: list[Tensor], file: tuple[Path, Shelf] | None = None) -> None:
        self._tensors, self._file = tensors, file
        if file is not None:
            weakref.finalize(self, file[0].unlink, missing_ok=True)

    def load(self) -> list[Tensor]:
        """The tensors, wherever they were put; from a file, in memory of their own."""
        if self._file is None:
            return self._tensors
        from safetensors.torch import load

        path, shelf = self._file
        content = path.read_bytes()
        shelf.moved(len(content))
        found = load(content)
        return [found[str(i)] for i in range(len(found))]
