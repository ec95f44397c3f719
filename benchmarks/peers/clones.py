"""Modules of other projects, loaded from unmodified local clones and run on the CPU."""

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

PruneLayer = Callable[[nn.Linear, Tensor, float, tuple[int, int] | None], None]
"""Prunes a layer in place: ``prune(layer, X, sparsity, n_of_m)`` with ``(P, N)`` inputs X and a sparsity or n of m."""


def load(clone: Path | None, file: str, url: str, stubbed: Sequence[str] = ()) -> ModuleType:
    """Load a file of a clone as a module, with ``cuda:0`` replaced by ``cpu``.

    Args:
        clone: folder of the clone.
        file: path of the file in it.
        url: address of the repository, for the error message.
        stubbed: modules that the file imports and that are replaced by empty ones.

    Raises:
        Unavailable: if the file does not exist.
    """
    path = Path(clone or "") / file
    if clone is None or not path.is_file():
        raise Unavailable(f"no '{file}' in {clone}: clone {url} and pass its folder")
    module = ModuleType(f"peer_{path.stem}")
    source = path.read_text(encoding="utf-8").replace("cuda:0", "cpu")
    with _stub_modules(stubbed):
        exec(compile(source, str(path), "exec"), module.__dict__)
    return module


@contextmanager
def _stub_modules(names: Sequence[str]) -> Iterator[None]:
    """A `with` in which these modules are importable and contain only a class Conv1D."""
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
def cpu_and_quiet() -> Iterator[None]:
    """A `with` without gradients and output to stdout, in which ``torch.cuda.synchronize`` does nothing."""
    synchronize, torch.cuda.synchronize = torch.cuda.synchronize, lambda *_: None
    try:
        with redirect_stdout(io.StringIO()), torch.no_grad():
            yield
    finally:
        torch.cuda.synchronize = synchronize
