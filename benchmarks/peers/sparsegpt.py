"""SparseGPT by its authors, from a local clone of github.com/IST-DASLab/sparsegpt."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from benchmarks.peers.clones import PruneLayer, cpu_and_quiet, load

NAME = "SparseGPT (authors)"


def method(clone: Path | None) -> PruneLayer:
    """The authors' `SparseGPT` with its default options.

    Args:
        clone: folder of the clone.

    Raises:
        Unavailable: if the clone does not exist.
    """
    module = load(clone, "sparsegpt.py", "github.com/IST-DASLab/sparsegpt", ["transformers", "quant"])

    def prune(layer: nn.Linear, X: Tensor, sparsity: float, n_of_m: tuple[int, int] | None) -> None:
        n, m = n_of_m or (0, 0)
        with cpu_and_quiet():
            pruner = module.SparseGPT(layer)
            pruner.add_batch(X, layer(X))
            pruner.fasterprune(sparsity, m - n, m)

    return prune
