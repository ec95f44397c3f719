"""States of solvers that depend on the inputs of a layer only, kept to be reused for other budgets."""

from __future__ import annotations

from typing import Any

import torch

from lightning_nettrim.runtime.offload import StoredTensors, TensorStore


class SolverStates:
    """States by layer, as named tuples of tensors.

    Args:
        store: where they are kept.
    """

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self._stored: dict[str, tuple[type, StoredTensors]] = {}

    def get(self, name: str, device: torch.device) -> Any:
        """The state of a layer on a device; ``None`` if there is none."""
        if name not in self._stored:
            return None
        kind, stored = self._stored[name]
        return kind(*(part.to(device) for part in stored.load()))

    def put(self, name: str, state: Any) -> None:
        """Keep the state of a layer, unless it is ``None`` or there is one already."""
        if state is not None and name not in self._stored:
            self._stored[name] = type(state), self._store.put(state)
