"""Shelf: tensors that wait until they are used, where they are, in the host's memory or on disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

OFFLOAD = ("device", "cpu", "disk")
"""Where tensors can wait."""


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
        self._count = 0

    def put(self, tensors: Sequence[Tensor]) -> Kept:
        """Keep some tensors; they are let go with what is returned."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        if self.offload == "disk" or self.size + size > self.room:
            return Kept([], self._write(tensors), self)
        if self.offload == "cpu":
            tensors = [t.cpu() for t in tensors]
        kept = Kept([t.detach() for t in tensors])
        self.size += size
        weakref.finalize(kept, self._lighter, size)
        return kept

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
        path: of that file, which is removed with this object.
        shelf: whose folder has to be there as long.
    """

    def __init__(self, tensors: list[Tensor], path: Path | None = None, shelf: Shelf | None = None) -> None:
        self._tensors, self._path, self._shelf = tensors, path, shelf
        if path is not None:
            weakref.finalize(self, path.unlink, missing_ok=True)

    def load(self) -> list[Tensor]:
        """The tensors, wherever they were put; from a file, in memory of their own."""
        if self._path is None:
            return self._tensors
        from safetensors.torch import load

        found = load(self._path.read_bytes())
        return [found[str(i)] for i in range(len(found))]
