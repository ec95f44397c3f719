"""Wanda with its authors' statistics, from a local clone of github.com/locuslab/wanda."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers.clones import Prune, load, running

NAME = "Wanda (authors)"


def method(clone: Path | None) -> Prune:
    """Their `WrappedGPT`; their ranking stands amid the code for one model, so its two lines are repeated here.

    Raises:
        Unavailable: if the clone is not there.
    """
    theirs = load(clone, "lib/layerwrapper.py", "github.com/locuslab/wanda")

    def prune(layer: nn.Linear, X: Tensor, sparsity: float, n_of_m: tuple[int, int] | None) -> None:
        with running():
            seen = theirs.WrappedGPT(layer)
            seen.add_batch(X, None)
            score = layer.weight.abs() * seen.scaler_row.sqrt()
            n, m = n_of_m or (score.shape[1] - int(score.shape[1] * sparsity), score.shape[1])
            score = score.reshape(-1, m)
            kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(n, dim=1).indices, True)
            layer.weight.mul_(kept.reshape(layer.weight.shape))

    return prune
