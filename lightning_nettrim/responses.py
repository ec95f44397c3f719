"""Responses: what the layers answered when trained, recorded in as few passes as memory allows, kept on a shelf."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nettrim.digest import digest
from lightning_nettrim.memory import passes
from lightning_nettrim.outcome import length
from lightning_nettrim.ranks import Ranks
from lightning_nettrim.shelf import Kept, Shelf
from lightning_nettrim.signals import Signals


class Responses:
    """Y of every layer, ``(groups, P, M)``, on the device when asked for.

    Args:
        shelf: where they wait.
        room: bytes that one recording may take.
    """

    def __init__(self, shelf: Shelf, room: float) -> None:
        self._shelf, self._room = shelf, room
        self._kept: dict[str, Kept] = {}
        self._device = torch.device("cpu")
        self.rows: dict[str, int] = {}
        self.sizes: dict[str, float] = {}

    def record(self, signals: Signals) -> None:
        """Take the responses of all layers by the weights that the model has now."""
        for group in passes(signals.todo.layers, signals.rows, self._room):
            for name, Y in signals.answers(*group).items():
                self._kept.pop(name, None)
                self._kept[name], self._device = self._shelf.put([Y]), Y.device
                self.rows[name], self.sizes[name] = Y.shape[1], length(Y, signals.ranks)

    def fingerprint(self) -> str:
        """Of all responses, by which networks that compute other things are told apart, whatever their weights."""
        return digest({name: digest(kept.load()) for name, kept in self._kept.items()})

    def distances(self, signals: Signals) -> dict[str, float]:
        """‖answer − trained answer‖ of every layer, by the weights that the model has now.

        Raises:
            ValueError: for a layer that is not called as in the trained network.
        """
        distances = {}
        for group in passes(signals.todo.layers, signals.rows, self._room):
            answers = signals.answers(*group)
            for name in group:
                self.expect_calls(name, answers[name].shape[1] if name in answers else 0, signals.ranks)
                distances[name] = length(answers.pop(name) - self[name], signals.ranks)
        return distances

    def expect_calls(self, name: str, rows: int, ranks: Ranks) -> None:
        """Raise ValueError unless a layer saw as many rows as in the trained network, in every process."""
        with ranks.together():
            if rows != self.rows[name]:
                raise ValueError(
                    f"{name}: expected to be called as in the trained network, on {self.rows[name]} rows, got {rows}:"
                    " the network decides by its signals whether to call it; ignore it"
                )

    def __getitem__(self, name: str) -> Tensor:
        """``(groups, P, M)``."""
        (Y,) = self._kept[name].load()
        return Y.to(self._device)
