"""The folder of a run."""

from __future__ import annotations

import os
import socket
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

NAME, RUNNING = "nettrim", "running"
"""Name of the folder, and of the file in it that names the process that uses it."""


def root(trainer: pl.Trainer) -> Path | None:
    """The folder of a run, as for its checkpoints; ``None`` if the Trainer must not write anything.

    It is the folder of the first logger, from its save_dir, name and version, or the Trainer's default folder.
    """
    where = None
    if not (trainer.fast_dev_run or trainer.barebones):  # type: ignore[attr-defined]
        where = str(_of_logger(trainer, trainer.loggers[0]) if trainer.loggers else trainer.default_root_dir)
    where = trainer.strategy.broadcast(where)
    return None if where is None else Path(where)


def _of_logger(trainer: pl.Trainer, logger: Any) -> Path:
    if (own := getattr(logger, "log_dir", None)) is not None:
        return Path(own)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    parts = [str(part) for part in (logger.name, version) if part is not None]
    return Path(logger.save_dir or trainer.default_root_dir, *parts)


def claim(trainer: pl.Trainer) -> Path | None:
    """Create the folder ``nettrim`` of this run, or ``nettrim_1`` and so on if it exists; ``None`` as for `root`."""
    where = root(trainer)
    if where is None:
        return None
    claimed = None
    if trainer.is_global_zero:
        for number in count():
            folder = where / (f"{NAME}_{number}" if number else NAME)
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            (folder / RUNNING).write_text(f"{socket.gethostname()} {os.getpid()}", encoding="utf-8")
            claimed = str(folder)
            break
    return Path(str(trainer.strategy.broadcast(claimed)))


def check_writable(trainer: pl.Trainer) -> None:
    """Check that the folder of the run can be created.

    Raises:
        MisconfigurationException: if it cannot.
    """
    where = root(trainer)
    while where is not None and not where.exists() and where != where.parent:
        where = where.parent
    if where is not None and not (where.is_dir() and os.access(where, os.W_OK)):
        raise MisconfigurationException(f"NetTrim: expected a folder to write into, got {where}: make it writable")


def interrupted(trainer: pl.Trainer, folder: Path) -> list[Path]:
    """Folders with finished layers of interrupted runs beside this one, the latest first."""
    patterns = [(folder.parent, f"{NAME}*/layers")]
    if trainer.loggers:  # other runs of the same logger are in sibling folders
        patterns.append((folder.parent.parent, f"*/{NAME}*/layers"))
    found = {path for where, pattern in patterns for path in where.glob(pattern) if not _running(path.parent)}
    return sorted(found, key=os.path.getmtime, reverse=True)


def release(folder: Path) -> None:
    """Mark that no process uses a folder any more."""
    (folder / RUNNING).unlink(missing_ok=True)


def _running(folder: Path) -> bool:
    """Whether another process of this machine uses a folder."""
    try:
        host, pid = (folder / RUNNING).read_text(encoding="utf-8").split()
        os.kill(int(pid), 0)
    except (OSError, ValueError):
        return False
    return host == socket.gethostname() and int(pid) != os.getpid()
