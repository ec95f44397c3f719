"""Safetensors files of which single tensors are read, and replaced in a copy, so that they need not fit into memory."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
"""Name of the file that assigns the tensors of a checkpoint to its files."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is: its file, the position of its first byte, and what its bytes mean."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The tensors of a safetensors file, or of a folder of them, each of which is read when it is asked for.

    Args:
        path: a safetensors file, or the folder of a checkpoint: the files that its ``model.safetensors.index.json``
            names or, without an index, all its safetensors files.

    Attributes:
        path: the same.

    Raises:
        ValueError: if there are no such files, or if one of them cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = {name: entry for file in self._files() for name, entry in _entries(file)}

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name].shape

    def read(self, name: str) -> Tensor:
        """A tensor, in new memory."""
        entry = self._entries[name]
        content = torch.empty(entry.size, dtype=torch.uint8)
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            view, done = _bytes(content), 0
            while done < entry.size:  # a single read returns at most 2 GiB
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{entry.path}: expected {entry.size} bytes of {name}, got {done}: save it again")
                done += count
        return content.view(entry.dtype).reshape(entry.shape)

    @contextmanager
    def copied(self, output: Path) -> Iterator[TensorCopy]:
        """A `with` that ends with a copy of the files at ``output``, in which tensors have been replaced.

        The copy is written under names that end in ``.partial``, which are removed if the body raises an exception. A
        folder is copied with its configuration files, so that the result is a checkpoint of the same kind.

        Args:
            output: a file if ``path`` is one, a folder if it is one; files of the same names are replaced.

        Raises:
            ValueError: if it is the same file or folder.
        """
        if output.resolve() == self.path.resolve():
            raise ValueError(f"output: expected another path than that of the weights, got {output}: choose one")
        sources = [self.path] if self.path.is_file() else self._copied_files()
        targets = {source: output if self.path.is_file() else output / source.name for source in sources}
        partial = {source: target.with_name(f"{target.name}.partial") for source, target in targets.items()}
        try:
            for source, path in partial.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, path)
            yield TensorCopy({name: (partial[entry.path], entry) for name, entry in self._entries.items()})
            for source, target in targets.items():
                os.replace(partial[source], target)
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """The safetensors files."""
        index = self.path / INDEX
        if self.path.is_file():
            return [self.path]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [self.path / name for name in names]
        if not (files := sorted(self.path.glob("*.safetensors"))):
            raise ValueError(f"weights: expected a safetensors file or a folder of them, got {self.path}: save one")
        return files

    def _copied_files(self) -> list[Path]:
        """The safetensors files, and the small files beside them."""
        others = (path for path in sorted(self.path.iterdir()) if path.suffix in (".json", ".txt", ".model", ".jinja"))
        return [*self._files(), *others]


class TensorCopy:
    """A copy of safetensors files, in which tensors are replaced in place.

    Args:
        entries: ``{name: (file of the copy, entry of the original)}``.
    """

    def __init__(self, entries: dict[str, tuple[Path, _Entry]]) -> None:
        self._entries = entries

    def write(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor by one of the same shape, converted to the dtype of the file."""
        path, entry = self._entries[name]
        content = tensor.detach().to("cpu", entry.dtype).contiguous().reshape(-1).view(torch.uint8)
        if len(content) != entry.size:
            raise ValueError(f"{name}: expected a tensor of shape {entry.shape}, got {tuple(tensor.shape)}")
        with path.open("r+b") as file:
            file.seek(entry.start)
            file.write(_bytes(content))


def _bytes(content: Tensor) -> memoryview:
    """The memory of a tensor of bytes."""
    array: Any = content.numpy()
    return memoryview(array)


def _entries(path: Path) -> Iterator[tuple[str, _Entry]]:
    """The names and places of the tensors in a file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        for name, item in header.items():
            if name != "__metadata__":
                start = 8 + length + item["data_offsets"][0]
                yield name, _Entry(path, start, tuple(item["shape"]), _DTYPES[item["dtype"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"weights: expected a safetensors file, got {path}: {error!r}") from error
