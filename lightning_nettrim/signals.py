"""Signals: what the layers of a plan see and answer on the held inputs, by the weights that the model has now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_nettrim.capture import Tape, record
from lightning_nettrim.layers import solve_dtype, with_bias
from lightning_nettrim.plan import Plan
from lightning_nettrim.sample import Inputs


@dataclass(frozen=True, eq=False)
class Signals:
    """A model and its held inputs, to be replayed as often as one likes; the model is in evaluation mode meanwhile.

    Args:
        model: the module.
        todo: which layers, how they are used.
        held: what `hold` returned.
        num_samples: rows per layer at most.
        seed: of that sample.
    """

    model: nn.Module
    todo: Plan
    held: Sequence[Inputs]
    num_samples: int
    seed: int

    def probe(self, size: int) -> Signals:
        """The same on about the first ``size`` of the inputs."""
        return replace(self, held=self.held[: max(1, len(self.held) * size // self.num_samples)])

    def answers(self, name: str | None = None) -> dict[str, Tensor]:
        """``{name: (P, M)}``: the responses, after their ReLU, of one layer or of all."""
        layers = self.todo.layers if name is None else {name: self.todo.layers[name]}
        tapes = record(self.model, layers, self.held, inputs=False, num_samples=self.num_samples, seed=self.seed)
        return {name: self.answer(name, tape) for name, tape in tapes.items()}

    def tapes(self, before: str | None, name: str) -> dict[str, Tape]:
        """What one layer sees, and what the layer before it answers, in one recording."""
        layers = {key: self.todo.layers[key] for key in (before, name) if key is not None}
        calls = sum(self.todo.flows[key].calls for key in layers)
        return record(self.model, layers, self.held, num_samples=self.num_samples, seed=self.seed, stop_after=calls)

    def inputs(self, name: str, tape: Tape) -> Tensor:
        """``(P, N)`` or, with a bias, ``(P, N + 1)``: what a layer saw.

        Raises:
            ValueError: for NaN and Inf.
        """
        return with_bias(self.todo.layers[name], _finite(name, tape.X))

    def answer(self, name: str, tape: Tape) -> Tensor:
        """What a layer answered after its ReLU, if it has one, in the solve's dtype.

        Raises:
            ValueError: for NaN and Inf.
        """
        Z = _finite(name, tape.Z)
        Z = Z.to(solve_dtype(Z.dtype))
        return Z.relu() if self.todo.flows[name].relu else Z

    def feeds(self, name: str, source: Tape, target: Tape) -> bool:
        """Whether the target's input is the source's answer, bit by bit and row by row."""
        answer = self.answer(name, source)
        return target.X is not None and torch.equal(answer, target.X.to(answer.dtype))

    def importance(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{name: (M,)}``: the norm of the weights by which other layers read each neuron, with mean square one.

        A layer is found to read another if on the first held batch its input is that one's answer; one that none reads
        is left out.
        """
        tapes = record(self.model, self.todo.layers, self.held[:1], num_samples=self.num_samples, seed=self.seed)
        factors = {}
        for name in tapes:
            readers = [reader for reader in tapes if reader != name and self.feeds(name, tapes[name], tapes[reader])]
            if readers:
                inputs = self.todo.layers[name].out_features
                square = torch.stack([weights[reader][:inputs].square().sum(-1) for reader in readers]).sum(0)
                factors[name] = (square / square.mean()).nan_to_num(1.0).clamp(min=1e-2).sqrt()
        return factors


def _finite(name: str, recorded: Tensor | None) -> Tensor:
    """The recording itself, if every number in it is finite."""
    assert recorded is not None
    if not bool(recorded.isfinite().all()):
        raise ValueError(f"{name}: expected finite activations, got NaN or Inf: look at the batches and at the weights")
    return recorded
