"""Processes of tests: each is forked from a server that has imported torch and Lightning once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "lightning.pytorch", "torch.distributed.tensor.parallel", "lightning_nettrim"]
)

TIMEOUT = 180
"""Seconds after which processes are ended."""


@dataclass(frozen=True)
class Finished:
    """A process that has ended.

    Attributes:
        returncode: its exit code; 1 after an exception.
        printed: what it has written to stdout and stderr.
    """

    returncode: int | None
    printed: str


def run_processes(function: Callable[..., object], arguments: Sequence[tuple], folder: Path) -> list[Finished]:
    """Call a function of a module in several processes with one thread each, when all of them have ended.

    Args:
        function: a function of a module.
        arguments: of each process.
        folder: for what the processes print.
    """
    return _run([(function, own, {}) for own in arguments], folder)


def run_ranks(function: Callable[..., object], arguments: tuple, count: int, folder: Path) -> list[Finished]:
    """Call a function in the processes of a Trainer, which takes their number and rank from the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    ranks = [shared | {"LOCAL_RANK": str(rank)} for rank in range(count)]
    return _run([(function, arguments, rank if count > 1 else {}) for rank in ranks], folder)


def _run(calls: Sequence[tuple[Callable[..., object], tuple, dict[str, str]]], folder: Path) -> list[Finished]:
    files = [folder / f"printed-{rank}.txt" for rank in range(len(calls))]
    processes = [CONTEXT.Process(target=_call, args=(file, *call)) for file, call in zip(files, calls, strict=True)]
    for process in processes:
        process.start()
    end = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()
    return [Finished(p.exitcode, file.read_text()) for p, file in zip(processes, files, strict=True)]


def _call(file: Path, function: Callable[..., object], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    with file.open("w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False, buffering=1) for descriptor in (1, 2))
    os.environ |= environment
    torch.set_num_threads(1)
    function(*arguments)
