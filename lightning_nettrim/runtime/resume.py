"""Results of a run on disk, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_nettrim.runtime.files import write_atomically
from lightning_nettrim.runtime.fingerprint import fingerprint

log = logging.getLogger(__name__)


class ResumeStore:
    """Entries of tensors and JSON values, each in a safetensors file that is written atomically; nothing is unpickled.

    An entry has a name, which determines its file name, and a key: the fingerprint of everything it was computed
    from. An entry is only read if its key is the same and its contents match their checksum. If a file cannot be
    written, the run continues without it. Process 0 writes; an entry is read by all processes or by none.

    Args:
        folder: folder of the files; it is created with the first one.
        others: folders of earlier runs, in which entries are looked up as well.
        processes: processes that read and write the entries together.

    Attributes:
        folder: folder of the files.
        used: number of entries of earlier runs that were read.
        reused: files in other folders that were read.
    """

    def __init__(self, folder: Path, others: Sequence[Path] = (), processes: ProcessGroup = SINGLE_PROCESS) -> None:
        self.folder, self._others = folder, [other for other in others if other != folder]
        self.used = 0
        self._own: set[tuple[str, str]] = set()  # names and keys of the entries of this run
        self.reused: list[Path] = []
        self._processes, self._writable = processes, processes.rank == 0

    def read(self, name: str, key: str) -> tuple[dict[str, Tensor], Any] | None:
        """Read an entry.

        Args:
            name: name of the entry.
            key: fingerprint of everything it is computed from.

        Returns:
            Its tensors and JSON values; ``None`` if there is no entry with this name and key.
        """
        entry = self._find(name, key)
        if not self._processes.all(entry is not None):
            return None
        assert entry is not None
        tensors, metadata, path = entry
        if path.parent != self.folder:
            self.reused.append(path)
        self.used += (name, key) not in self._own
        return tensors, metadata

    def _find(self, name: str, key: str) -> tuple[dict[str, Tensor], Any, Path] | None:
        for folder in (self.folder, *self._others):
            path = folder / _file_name(name)
            if not path.exists():
                continue
            try:
                entry = _read(path, key)
            except Exception as error:  # a damaged file can raise any exception
                log.warning("NetTrim: %s cannot be read (%s): it is computed again", path, error)
                continue
            if entry is not None:
                return *entry, path
            if folder == self.folder:
                log.warning(
                    "NetTrim: %s was computed with another network, other data or other settings: it is computed again",
                    path,
                )
        return None

    def write(self, name: str, key: str, tensors: Mapping[str, Tensor], metadata: Any) -> None:
        """Write an entry; it replaces one of the same name.

        Args:
            name: name of the entry.
            key: fingerprint of everything it was computed from.
            tensors: tensors of the entry by name.
            metadata: values that can be written as JSON.
        """
        self._own.add((name, key))
        if not self._writable:
            return
        path = self.folder / _file_name(name)
        try:
            _write(path, key, tensors, metadata)
        except OSError as error:
            self._writable = False
            log.warning(
                "NetTrim: %s cannot be written (%s): the run continues, but cannot be resumed after an interruption",
                path, error,
            )  # fmt: skip

    def remove(self) -> None:
        """Remove the entries in this run's own folder, by process 0; other folders are not changed."""
        if self._processes.rank == 0:
            remove_entries(self.folder)


def remove_entries(folder: Path, reused: Sequence[Path] = ()) -> None:
    """Remove the entries of a finished run and the files of earlier runs that it has read, and folders left empty."""
    for path in [*folder.glob("*.safetensors*"), *reused]:
        if path.is_file():
            path.unlink(missing_ok=True)
    for parent in {folder, *(path.parent for path in reused)}:
        if parent.exists() and not any(parent.iterdir()):
            parent.rmdir()


def _file_name(name: str) -> str:
    """File name of an entry; the name of the root module is empty."""
    return "".join(c if c.isalnum() or c in "._-@" else "_" for c in name or "model") + ".safetensors"


def _read(path: Path, key: str) -> tuple[dict[str, Tensor], Any] | None:
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        if header.get("key") != key:
            return None
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if header["contents"] != fingerprint(tensors, header["metadata"]):
        raise ValueError("its contents do not match their checksum")
    return tensors, json.loads(header["metadata"])


def _write(path: Path, key: str, tensors: Mapping[str, Tensor], metadata: Any) -> None:
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(metadata)
    write_atomically(path, save(on_cpu, {"key": key, "metadata": text, "contents": fingerprint(on_cpu, text)}))
