"""A uniform sample of bounded size of the rows of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_nettrim.runtime.offload import StoredTensors, TensorStore


class Reservoir:
    """A uniform sample of at most ``size`` rows of a stream, in the order of the stream.

    Every row draws a uniform random key, and the rows with the ``size`` smallest keys are kept (bottom-k sampling), so
    that a smaller sample is a subset of a larger one. The sample depends on the seed and the numbers of rows alone.

    Args:
        size: maximum number of rows.
        seed: seed of the keys.
        store: where the rows are kept; if ``None``, on their own device.

    Attributes:
        seen: number of rows of the stream so far.
    """

    def __init__(self, size: int, seed: int, store: TensorStore | None = None) -> None:
        self.size, self.seen = size, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._threshold = float("inf")
        self._store = TensorStore("device") if store is None else store
        self._keys: list[Tensor] = []
        self._chunks: list[StoredTensors] = []
        self._labels: list[Any] = []

    def pick(self, count: int, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Select from the next rows of the stream.

        Args:
            count: number of rows.
            whole: let all of them share one key, so that they are kept or dropped together; the sample may then exceed
                its size.

        Returns:
            ``(n,)`` indices of the selected rows and ``(n,)`` their keys; pass both to `keep`. Selected rows may be
            dropped later.
        """
        keys = torch.rand(1 if whole else count, generator=self._generator, dtype=torch.float64).expand(count)
        self.seen += count
        selected = (keys < self._threshold).nonzero().squeeze(1)
        if len(selected) > self.size:
            selected = (keys <= keys.kthvalue(self.size).values).nonzero().squeeze(1)
        return selected, keys[selected]

    def keep(self, keys: Tensor, tensors: Sequence[Tensor], label: Any = None) -> None:
        """Add selected rows to the sample, as one chunk.

        Args:
            keys: ``(n,)`` their keys.
            tensors: the rows, in any number of tensors of length n.
            label: label of the chunk.
        """
        if not len(keys):
            return
        self._keys.append(keys)
        self._chunks.append(self._store.put(tensors))
        self._labels.append(label)
        if sum(map(len, self._keys)) > 2 * self.size:
            self._shrink()

    def offer(self, tensors: Sequence[Tensor], label: Any = None) -> None:
        """Select from the next rows of the stream, in several tensors of one length, and add the selected ones."""
        selected, keys = self.pick(len(tensors[0]))
        self.keep(keys, [t.index_select(0, selected.to(t.device)) for t in tensors], label)

    def chunks(self) -> list[StoredTensors]:
        """The sample in chunks, without those of which no rows are left."""
        if sum(map(len, self._keys)) > self.size:
            self._shrink()
        return self._chunks

    @property
    def labels(self) -> list[Any]:
        """Labels of the chunks, in order."""
        return self._labels

    def _shrink(self) -> None:
        """Drop all rows but those with the ``size`` smallest keys."""
        self._threshold = float(torch.cat(self._keys).kthvalue(self.size).values)
        kept = [(keys <= self._threshold).nonzero().squeeze(1) for keys in self._keys]
        pairs = [(i, keep) for i, keep in enumerate(kept) if len(keep)]
        for i, keep in pairs:
            if len(keep) < len(self._keys[i]):
                rows = [t.index_select(0, keep.to(t.device)) for t in self._chunks[i].load()]
                self._chunks[i] = self._store.put(rows)
        self._chunks = [self._chunks[i] for i, _ in pairs]
        self._keys = [self._keys[i][keep] for i, keep in pairs]
        self._labels = [self._labels[i] for i, _ in pairs]
