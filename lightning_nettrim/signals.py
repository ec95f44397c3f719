"""Signals: what the layers of a plan see and answer on the held inputs, by the weights that the model has now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_nettrim.capture import Tape, record
from lightning_nettrim.fold import Fold
from lightning_nettrim.plan import Plan
from lightning_nettrim.ranks import ALONE, Ranks
from lightning_nettrim.sample import Held

GLANCE = 256
"""Rows at which it is seen which layer reads which."""


@dataclass(frozen=True, eq=False)
class Signals:
    """A model and its held inputs, to be replayed as often as one likes; the model is in evaluation mode meanwhile.

    Args:
        model: the module.
        todo: which layers, how they are used.
        folds: what follows each layer, as trained.
        held: what `hold` returned.
        rows: of each layer, at most.
        seed: of that sample.
        ranks: the processes of which each has inputs of its own.
    """

    model: nn.Module
    todo: Plan
    folds: Mapping[str, Fold]
    held: Held
    rows: Mapping[str, int]
    seed: int
    ranks: Ranks = ALONE

    def probe(self, size: int) -> Signals:
        """The same on about the first ``size`` inputs."""
        return replace(self, held=self.held.first(size))

    def answers(self, *names: str) -> dict[str, Tensor]:
        """``{name: (groups, P, M)}``: the responses of some layers, behind all that follows them."""
        tapes = self.tapes(*names, inputs=())
        return {name: self.answer(name, tapes.pop(name)) for name in names if name in tapes}

    def tapes(
        self, *names: str, inputs: Collection[str] | None = None, outputs: Collection[str] | None = None
    ) -> dict[str, Tape]:
        """What some layers see and answer, or only what some of those see and others answer, in one recording."""
        layers = {name: self.todo.layers[name] for name in names}
        with self.ranks.together():
            return record(
                self.model, layers, self.held, flows=self.todo.flows, inputs=inputs, outputs=outputs,
                num_samples=self.rows, seed=self.seed, stop=True,
            )  # fmt: skip

    def inputs(self, name: str, tape: Tape) -> Tensor:
        """``(groups, P, N)`` or, with a column of ones, ``(groups, P, N + 1)``: what a layer saw.

        Raises:
            ValueError: for NaN and Inf.
        """
        return self.folds[name].rows(self._finite(name, tape.X))

    def offset(self, name: str, tape: Tape) -> Tensor | None:
        """``(groups, P or 1, M)``: what is added to a layer's products."""
        return self.folds[name].offset(None if tape.R is None else self._finite(name, tape.R))

    def answer(self, name: str, tape: Tape) -> Tensor:
        """``(groups, P, M)``: what a layer answered behind all that follows it now, in the solve's dtype.

        Raises:
            ValueError: for NaN and Inf.
        """
        fold = self.folds[name].now(self.todo.flows[name], self.model)
        return fold.answer(self._finite(name, tape.Z), None if tape.R is None else self._finite(name, tape.R))

    def feeds(self, name: str, source: Tape, target: Tape) -> bool:
        """Whether the target's input is the source's answer, bit by bit and row by row, in every process."""
        return self._equal(self.answer(name, source)[0], target)

    def _equal(self, answer: Tensor, target: Tape) -> bool:
        return self.ranks.all(target.X is not None and torch.equal(answer, target.X.to(answer.dtype)))

    def importance(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{name: (groups, 1, M)}``: the norm of the weights by which others read each neuron, with mean square one.

        A layer is found to read another if on some rows of the first held batch its input is that one's answer; one
        that none reads is left out.
        """
        first = replace(self, held=self.held[:1], rows=dict.fromkeys(self.rows, GLANCE))
        tapes = first.tapes(*self.todo.layers)
        answers = {name: self.answer(name, tape)[0] for name, tape in tapes.items()}
        factors = {}
        for name, answer in answers.items():
            readers = [reader for reader in tapes if reader != name and self._equal(answer, tapes[reader])]
            if readers:
                inputs = self.todo.layers[name].outputs
                square = torch.stack([weights[reader][0, :inputs].square().sum(-1) for reader in readers]).sum(0)
                factors[name] = (square / square.mean()).nan_to_num(1.0).clamp(min=1e-2).sqrt().reshape(1, 1, -1)
        return factors

    def _finite(self, name: str, recorded: Tensor | None) -> Tensor:
        """The recording itself, if every number in it is finite; an error in one process is one in all."""
        assert recorded is not None
        with self.ranks.together():
            if not bool(recorded.isfinite().all()):
                raise ValueError(
                    f"{name}: expected finite activations, got NaN or Inf: look at the batches and at the weights"
                )
        return recorded
