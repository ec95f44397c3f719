"""Pattern: which weights are kept or pruned together, and among which others they compete for their place."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """The shape of a layer's zeros: blocks of weights, of which a number is kept in each set of blocks.

    Args:
        name: ``unstructured``, single weights of the whole layer; ``per_neuron``, equally many in each output;
            ``n:m`` (``2:4``), n of every m consecutive inputs of an output; ``neuron``, whole outputs but for their
            free bias; ``rxc`` (``4x4``), blocks of r outputs by c inputs, as they lie in a layer's ``weight``.

    Raises:
        ValueError: for any other name.
    """

    name: str = "unstructured"

    def __post_init__(self) -> None:
        """Refuse a name that is none."""
        if self.name in ("unstructured", "per_neuron", "neuron"):
            return
        found = re.fullmatch(r"([1-9]\d*)([:x])([1-9]\d*)", self.name)
        if not found or (found[2] == ":" and int(found[1]) >= int(found[3])):
            raise ValueError(
                "pattern: expected 'unstructured', 'per_neuron', 'neuron', n of m as '2:4' or outputs by inputs as"
                f" '4x4', got {self.name!r}"
            )

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """N and m of ``n:m``; None for the other patterns."""
        n, colon, m = self.name.partition(":")
        return (int(n), int(m)) if colon else None

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros that the pattern itself fixes, 1 − n/m; None where it is free."""
        return None if self.n_of_m is None else 1 - self.n_of_m[0] / self.n_of_m[1]

    def _block(self, N: int) -> tuple[int, int]:
        """Outputs and inputs of a block."""
        rows, cross, columns = self.name.partition("x")
        return (int(rows), int(columns)) if cross else (1, N if self.name == "neuron" else 1)

    def _sets(self, N: int, M: int) -> int:
        """Sets in which blocks compete."""
        if self.n_of_m is not None:
            return N * M // self.n_of_m[1]
        return M if self.name == "per_neuron" else 1

    def check(self, N: int, M: int) -> None:
        """Raise ValueError unless N inputs and M outputs divide into the pattern's groups and blocks."""
        rows, columns = self._block(N)
        m = self.n_of_m[1] if self.n_of_m else columns
        for what, size, group in (("inputs", N, m), ("outputs", M, rows)):
            if size % group:
                raise ValueError(
                    f"pattern {self.name!r}: expected a multiple of {group} {what}, got {size}: choose another pattern"
                    " for this layer, or ignore it"
                )

    def groups(self, W: Tensor) -> Tensor:
        """``(*batch, N, M)`` as ``(*batch, sets, blocks of a set, weights of a block)``."""
        N, M = W.shape[-2:]
        if self.name == "unstructured":  # whose order does not matter
            return W.reshape(*W.shape[:-2], 1, N * M, 1)
        r, c = self._block(N)
        blocks = W.mT.reshape(*W.shape[:-2], M // r, r, N // c, c).transpose(-3, -2)
        return blocks.reshape(*W.shape[:-2], self._sets(N, M), -1, r * c)

    def ungroup(self, groups: Tensor, N: int, M: int) -> Tensor:
        """`groups` turned round."""
        if self.name == "unstructured":
            return groups.reshape(*groups.shape[:-3], N, M)
        r, c = self._block(N)
        blocks = groups.reshape(*groups.shape[:-3], M // r, N // c, r, c).transpose(-3, -2)
        return blocks.reshape(*groups.shape[:-3], M, N).mT

    def kept(self, sparsity: float, N: int, M: int) -> int:
        """Blocks kept in each set at this sparsity, to the nearest."""
        if self.n_of_m is not None:
            return self.n_of_m[0]
        r, c = self._block(N)
        size = N * M // (r * c * self._sets(N, M))
        return size - round(sparsity * size)

    def nonzeros(self, sparsity: float, N: int, M: int) -> int:
        """Weights kept in all at this sparsity."""
        r, c = self._block(N)
        return self.kept(sparsity, N, M) * self._sets(N, M) * r * c

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """``(*batch, N, M)`` bool: in each set exactly the ``kept`` blocks with the largest sum of scores."""
        worth = self.groups(score).sum(-1)
        chosen = torch.zeros_like(worth, dtype=torch.bool).scatter_(
            -1, worth.topk(kept, dim=-1, sorted=False).indices, True
        )
        return self._spread(chosen, score)

    def _spread(self, chosen: Tensor, like: Tensor) -> Tensor:
        N, M = like.shape[-2:]
        r, c = self._block(N)
        return self.ungroup(chosen.unsqueeze(-1).expand(*chosen.shape, r * c), N, M)
