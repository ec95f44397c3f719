"""Nested values, such as batches, whose tensors are in a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_nettrim.calibration.nested import Structure, flatten
from lightning_nettrim.runtime.offload import StoredTensors, TensorStore

TENSOR = object()
"""Placeholder for a tensor among the leaves of a batch."""


@dataclass(frozen=True, eq=False)
class Template:
    """A batch without its tensors.

    Attributes:
        leaves: the leaves, with ``TENSOR`` in place of tensors.
        structure: the structure.
        divisible: whether the batch can be split and concatenated with others.
        tensors: the tensors of a batch that is not divisible.
    """

    leaves: list[Any]
    structure: Structure
    divisible: bool
    tensors: StoredTensors | None = None

    def matches(self, other: Template) -> bool:
        """Whether batches of both templates can be concatenated."""
        return self.divisible and other.divisible and self.structure == other.structure and self._same_leaves(other)

    def _same_leaves(self, other: Template) -> bool:
        try:
            return all(a is b or bool(a == b) for a, b in zip(self.leaves, other.leaves, strict=True))
        except Exception:  # raised by objects that cannot be compared
            return False


@dataclass(frozen=True, eq=False)
class StoredBatch:
    """A nested value, such as a batch, whose tensors are in a store; ``rows`` selects some rows, ``None`` is all."""

    tensors: StoredTensors
    template: Template
    rows: slice | None = None

    @classmethod
    def of(cls, value: Any, store: TensorStore, divisible: bool) -> StoredBatch:
        """Store a nested value.

        Args:
            value: any nested tensors.
            store: where the tensors are kept.
            divisible: whether the first dimension of all its tensors is that of the inputs.
        """
        leaves, structure = flatten(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        leaves = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(store.put(tensors), Template(leaves, structure, divisible))

    def load(self) -> Any:
        """The batch."""
        tensors = self.tensors.load()
        parts = iter(tensors if self.rows is None else [t[self.rows] for t in tensors])
        leaves = [next(parts) if leaf is TENSOR else leaf for leaf in self.template.leaves]
        return self.template.structure.build(iter(leaves))

    def halves(self) -> list[StoredBatch]:
        """Two batches with half of the rows each, or this one if it cannot be split."""
        tensors = self.tensors.load() if self.template.divisible else []
        start, stop, _ = (self.rows or slice(None)).indices(min(map(len, tensors), default=0))
        middle = (start + stop + 1) // 2
        if stop - start < 2:
            return [self]
        return [replace(self, rows=slice(start, middle)), replace(self, rows=slice(middle, stop))]


@dataclass(frozen=True, eq=False)
class StoredPair:
    """A batch and a value that belongs to it, which are split together."""

    batch: StoredBatch | StoredPair
    value: StoredBatch | None

    def load(self) -> tuple[Any, Any]:
        """The batch and the value."""
        return self.batch.load(), None if self.value is None else self.value.load()

    def halves(self) -> list[StoredPair]:
        """Two pairs with half of the rows each, or this one if one of both cannot be split."""
        batches: Sequence[StoredBatch | StoredPair] = self.batch.halves()
        values: Sequence[StoredBatch | None] = [None, None] if self.value is None else self.value.halves()
        split = len(batches) == len(values) == 2
        return [StoredPair(batch, value) for batch, value in zip(batches, values, strict=True)] if split else [self]
