"""Wanda with its authors' statistics, from a local clone of github.com/locuslab/wanda."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers.clones import PruneLayer, cpu_and_quiet, load

NAME = "Wanda (authors)"


def method(clone: Path | None) -> PruneLayer:
    """The authors' `WrappedGPT` and their ranking of the weights.

    The ranking is part of their code for one model, so its two lines are repeated here.

    Args:
        clone: folder of the clone.

    Raises:
        Unavailable: if the clone does not exist.
    """
    module = load(clone, "lib/layerwrapper.py", "github.com/locuslab/wanda")

    def prune(layer: nn.Linear, X: Tensor, sparsity: float, n_of_m: tuple[int, int] | None) -> None:
        with cpu_and_quiet():
            statistics = module.WrappedGPT(layer)
            statistics.add_batch(X, None)
            score = layer.weight.abs() * statistics.scaler_row.sqrt()
            n, m = n_of_m or (score.shape[1] - int(score.shape[1] * sparsity), score.shape[1])
            score = score.reshape(-1, m)
            kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(n, dim=1).indices, True)
            layer.weight.mul_(kept.reshape(layer.weight.shape))

    return prune
