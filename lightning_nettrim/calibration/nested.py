"""Nested batches: flattening into a list of leaves, and rebuilding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """The structure of a nested batch, without its leaves.

    Attributes:
        kind: class of the container; ``None`` for a leaf.
        keys: keys of a mapping, in order; ``None`` for other containers.
        children: structures of the elements of the container.
    """

    kind: type | None = None
    keys: tuple[Any, ...] | None = None
    children: tuple[Structure, ...] = ()

    def build(self, leaves: Iterator[Any]) -> Any:
        """The batch with this structure and the given leaves."""
        if self.kind is None:
            return next(leaves)
        values = [child.build(leaves) for child in self.children]
        if self.keys is not None:
            mapping = dict(zip(self.keys, values, strict=True))
            return mapping if self.kind is dict else self.kind(mapping)
        return self.kind(*values) if hasattr(self.kind, "_fields") else self.kind(values)


def flatten(batch: Any) -> tuple[list[Any], Structure]:
    """The leaves of nested mappings, lists, tuples and named tuples, and their structure.

    Any other object is a leaf; tensors inside such objects are not found.
    """
    leaves: list[Any] = []
    return leaves, _flatten(batch, leaves)


def _flatten(value: Any, leaves: list[Any]) -> Structure:
    kind = type(value)
    if isinstance(value, Mapping):
        return Structure(kind, tuple(value), tuple(_flatten(value[key], leaves) for key in value))
    if kind in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return Structure(kind, None, tuple(_flatten(item, leaves) for item in value))
    leaves.append(value)
    return Structure()


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with a function applied to every tensor."""
    leaves, structure = flatten(batch)
    return structure.build(iter([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]))


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on a device; leaves with a method ``to``, such as tensors and batches of graphs, are moved."""
    leaves, structure = flatten(batch)
    moved = [leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf for leaf in leaves]
    return structure.build(iter(moved))


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in a batch, in order."""
    return [leaf for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)]


def common_length(batch: Any) -> int | None:
    """Size of the first dimension if all tensors have the same one; ``None`` otherwise, or if there are no tensors."""
    lengths = {len(tensor) if tensor.dim() else -1 for tensor in tensors_of(batch)}
    return lengths.pop() if len(lengths) == 1 and -1 not in lengths else None


def count_inputs(batch: Any) -> int:
    """Number of inputs in a batch: size of the first dimension of its first tensor, at least 1."""
    return next((max(len(tensor), 1) for tensor in tensors_of(batch) if tensor.dim()), 1)
