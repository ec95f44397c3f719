"""Reference outputs: the responses of all layers of the trained network on the calibration set."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.memory_model import recording_groups
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_nettrim.runtime.fingerprint import fingerprint
from lightning_nettrim.runtime.offload import StoredTensors, TensorStore


def norm_over_processes(R: Tensor, processes: ProcessGroup = SINGLE_PROCESS) -> float:
    """‖R‖ of the rows of all processes, accumulated in float64."""
    return float(processes.norm(torch.linalg.vector_norm(R, dtype=torch.float64)))


class ReferenceOutputs:
    """``(groups, P, M)`` trained responses of every layer, recorded in as few passes as the memory allows.

    Args:
        store: where they are kept.
        available: bytes that one recording may take.

    Attributes:
        rows: ``{name: P}``.
        norms: ``{name: ‖Y‖}`` over all processes.
    """

    def __init__(self, store: TensorStore, available: float) -> None:
        self._store, self._available = store, available
        self._stored: dict[str, StoredTensors] = {}
        self._device = torch.device("cpu")
        self.rows: dict[str, int] = {}
        self.norms: dict[str, float] = {}

    def record(self, activations: Activations) -> None:
        """Record the responses of all layers with the current weights of the model."""
        for group in recording_groups(activations.layers, activations.rows, self._available):
            for name, Y in activations.responses(*group).items():
                self.put(name, Y, activations.processes)

    def put(self, name: str, Y: Tensor, processes: ProcessGroup) -> None:
        """Keep the response of one layer."""
        self._stored.pop(name, None)
        self._stored[name], self._device = self._store.put([Y]), Y.device
        self.rows[name], self.norms[name] = Y.shape[1], norm_over_processes(Y, processes)

    def fingerprint(self) -> str:
        """Fingerprint of all responses, which differs between networks that compute different functions."""
        return fingerprint({name: fingerprint(stored.load()) for name, stored in self._stored.items()})

    def distances(self, activations: Activations) -> dict[str, float]:
        """‖response − reference‖ of every layer with the current weights of the model.

        Raises:
            ValueError: for a layer that is not called as often as in the trained network.
        """
        distances = {}
        for group in recording_groups(activations.layers, activations.rows, self._available):
            responses = activations.responses(*group)
            for name in group:
                rows = responses[name].shape[1] if name in responses else 0
                self.check_rows(name, rows, activations.processes)
                distances[name] = norm_over_processes(responses.pop(name) - self[name], activations.processes)
        return distances

    def check_rows(self, name: str, rows: int, processes: ProcessGroup) -> None:
        """Check, in every process, that a layer has received as many rows as in the trained network.

        Raises:
            ValueError: if it has not.
        """
        with processes.raise_together():
            if rows != self.rows[name]:
                raise ValueError(
                    f"{name}: expected {self.rows[name]} rows as in the trained network, got {rows}: whether the"
                    " network calls this layer depends on its activations; ignore it"
                )

    def __getitem__(self, name: str) -> Tensor:
        """``(groups, P, M)``, on the device of the model."""
        (Y,) = self._stored[name].load()
        return Y.to(self._device)
