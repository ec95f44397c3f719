"""ALPS by its authors, from a local clone of github.com/mazumder-lab/ALPS."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from benchmarks.peers.clones import PruneLayer, cpu_and_quiet, load

NAME = "ALPS (authors)"


def method(clone: Path | None) -> PruneLayer:
    """The authors' `ALPS_prune` with its default options.

    Args:
        clone: folder of the clone.

    Raises:
        Unavailable: if the clone does not exist.
    """
    module = load(clone, "alps.py", "github.com/mazumder-lab/ALPS", ["transformers"])

    def prune(layer: nn.Linear, X: Tensor, sparsity: float, n_of_m: tuple[int, int] | None) -> None:
        with cpu_and_quiet():
            pruner = module.ALPS_prune(layer, len(X), 1)
            pruner.add_batch(X, layer(X))
            pruner.ALPS_admm(sparsity, *(n_of_m or (0, 0)))

    return prune
