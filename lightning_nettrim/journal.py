"""Journal: what a run has finished, on disk, so that the next one goes on where it was cut short."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_nettrim.digest import digest
from lightning_nettrim.ranks import ALONE, Ranks

log = logging.getLogger(__name__)


class Journal:
    """Entries of tensors and facts, each in a safetensors file that is whole or not there; nothing is unpickled.

    An entry has a name, by which its file is called, and a cause: the fingerprint of everything it was computed from.
    It is read back for the same cause only, and only if its own contents are what was written. Where a file cannot be
    written, the run goes on without. Of several processes the first one writes; an entry is read by all or by none.

    Args:
        folder: of the files; it is made with the first one.
        others: folders of earlier runs, in which an entry is looked for as well.
        ranks: the processes that use them together.
    """

    def __init__(self, folder: Path, others: Sequence[Path] = (), ranks: Ranks = ALONE) -> None:
        self.folder, self._others = folder, [other for other in others if other != folder]
        self.used = 0  # entries of earlier runs that were read back
        self._own: set[tuple[str, str]] = set()  # names and causes of the entries of this run
        self.reused: list[Path] = []  # files of other folders that were read back
        self._ranks, self._writable = ranks, ranks.rank == 0

    def read(self, name: str, cause: str) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and the facts of an entry; ``None`` where there is none for this cause."""
        found = self._find(name, cause)
        if not self._ranks.all(found is not None):
            return None
        assert found is not None
        tensors, facts, path = found
        if path.parent != self.folder:
            self.reused.append(path)
        self.used += (name, cause) not in self._own
        return tensors, facts

    def _find(self, name: str, cause: str) -> tuple[dict[str, Tensor], Any, Path] | None:
        for folder in (self.folder, *self._others):
            path = folder / _file(name)
            if not path.exists():
                continue
            try:
                found = _read(path, cause)
            except Exception as error:  # whatever a damaged file makes its reader raise
                log.warning("NetTrim: %s cannot be read (%s): computed again", path, error)
                continue
            if found is not None:
                return *found, path
            if folder == self.folder:
                log.warning("NetTrim: %s is of another network, other data or other settings: computed again", path)
        return None

    def write(self, name: str, cause: str, tensors: Mapping[str, Tensor], facts: Any) -> None:
        """Add an entry, in place of one of the same name."""
        self._own.add((name, cause))
        if not self._writable:
            return
        path = self.folder / _file(name)
        try:
            _write(path, cause, tensors, facts)
        except (OSError, ImportError) as error:
            self._writable = False
            log.warning("NetTrim: %s cannot be written (%s): going on, but an interruption will cost all", path, error)


def clear(folder: Path, reused: Sequence[Path] = ()) -> None:
    """Remove the entries of a finished run, and those of earlier runs that it has read: they have served."""
    for path in [*folder.glob("*.safetensors*"), *reused]:
        path.unlink(missing_ok=True)
    for parent in {folder, *(path.parent for path in reused)}:
        if parent.exists() and not any(parent.iterdir()):
            parent.rmdir()


def _file(name: str) -> str:
    """A file name from a layer's; the model itself, whose name is empty, gets one too."""
    return "".join(c if c.isalnum() or c in "._-@" else "_" for c in name or "model") + ".safetensors"


def _read(path: Path, cause: str) -> tuple[dict[str, Tensor], Any] | None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        if header.get("cause") != cause:
            return None
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    if header["contents"] != digest(tensors, header["facts"]):
        raise ValueError("its contents are not what was written")
    return tensors, json.loads(header["facts"])


def _write(path: Path, cause: str, tensors: Mapping[str, Tensor], facts: Any) -> None:
    from safetensors.torch import save

    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    text = json.dumps(facts)
    write_whole(path, save(plain, {"cause": cause, "facts": text, "contents": digest(plain, text)}))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
