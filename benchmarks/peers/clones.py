"""Code of other authors from local clones, unchanged on disk: read, told of the device, and run as a module."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.peers import Unavailable

Prune = Callable[[nn.Linear, Tensor, float, tuple[int, int] | None], None]
"""Prunes a layer in place, from its ``(P, N)`` inputs, to a sparsity or to n of m."""


def load(clone: Path | None, file: str, address: str, imports: Sequence[str] = ()) -> ModuleType:
    """A file of a clone as a module, with ``cuda:0`` read as the CPU and its imports of other projects as empty ones.

    Raises:
        Unavailable: if the file is not there.
    """
    path = Path(clone or "") / file
    if clone is None or not path.is_file():
        raise Unavailable(f"no '{file}' in {clone}: clone {address} and name its folder")
    module = ModuleType(f"peer_{path.stem}")
    source = path.read_text(encoding="utf-8").replace("cuda:0", "cpu")
    with _stubbed(imports):
        exec(compile(source, str(path), "exec"), module.__dict__)
    return module


@contextmanager
def _stubbed(names: Sequence[str]) -> Iterator[None]:
    """A `with` in which these modules can be imported, empty but for a class Conv1D."""
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].Conv1D = type("Conv1D", (), {})  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@contextmanager
def running() -> Iterator[None]:
    """A `with` in which their code says nothing and waits for no CUDA device."""
    synchronize, torch.cuda.synchronize = torch.cuda.synchronize, lambda *_: None
    try:
        with redirect_stdout(io.StringIO()), torch.no_grad():
            yield
    finally:
        torch.cuda.synchronize = synchronize
