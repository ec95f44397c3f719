"""Trained: a model as it was trained, what its layers answer on the held inputs, and the way back to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version

from torch import Tensor, nn

from lightning_nettrim import mask
from lightning_nettrim.digest import digest
from lightning_nettrim.fold import Fold
from lightning_nettrim.journal import Journal
from lightning_nettrim.layers import joined
from lightning_nettrim.memory import LEAST_ROWS, Meter, rows_within, with_less
from lightning_nettrim.method import Method, Spectra
from lightning_nettrim.plan import Plan
from lightning_nettrim.ranks import ALONE, Ranks
from lightning_nettrim.replay import evaluating
from lightning_nettrim.responses import Responses
from lightning_nettrim.sample import Held
from lightning_nettrim.shelf import Shelf
from lightning_nettrim.signals import Signals
from lightning_nettrim.solvers import Solver
from lightning_nettrim.structure import flatten

log = logging.getLogger(__name__)

CLOSE = 1.1
"""Factor by which the memory that is found to be left differs between two runs alike."""


@dataclass(frozen=True)
class Settings:
    """How a `Pruner` goes about it.

    Args:
        scheme: ``"cascade"`` or ``"parallel"``.
        solver: the method; ``None`` is `Cardinality` for a sparsity and `ADMM` for an epsilon.
        max_rows: rows per layer at most.
        seed: of that sample.
        penalize_bias: let biases be pruned like weights.
        importance: ``"outgoing"`` or ``"equal"``, what a neuron's error counts in `Cardinality`.
        recalibrate: re-estimate the running statistics of BatchNorms.
        on_failure: ``"magnitude"``, prune by magnitude and refit instead, or ``"dense"``, leave the layer as it is.
        ranks: the processes that do this together, each on inputs of its own.
    """

    scheme: str
    solver: Solver | None
    max_rows: int
    seed: int
    penalize_bias: bool
    importance: str
    recalibrate: bool
    on_failure: str = "magnitude"
    ranks: Ranks = ALONE


class Trained:
    """A trained model, the layers of a plan, and what those answer on the held inputs.

    Args:
        model: a trained module.
        todo: which layers, how they are used.
        held: what `hold` returned.
        settings: how to go about it.
        room: bytes that recording and solving a layer may take.
        shelf: where the trained responses, and spectra that serve again, wait.
        journal: what an earlier run has finished, and where this one writes.
        meter: of memory.
        rows: of each layer, at most; ``None`` is as many of the samples as fit into the room.
    """

    def __init__(
        self,
        model: nn.Module,
        todo: Plan,
        held: Held,
        settings: Settings,
        room: float = float("inf"),
        shelf: Shelf | None = None,
        journal: Journal | None = None,
        meter: Meter | None = None,
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.model, self.todo, self.settings, self.journal = model, todo, settings, journal
        self.room, self.meter = room, meter
        self.notes: list[str] = []
        penalize_bias = settings.penalize_bias
        self.folds = {
            name: Fold.of(layer, todo.flows[name], model, penalize_bias) for name, layer in todo.layers.items()
        }
        cause = "" if journal is None else self._cause(held)
        rows = self._rows(cause) if rows is None else dict(rows)
        self.cause = digest(cause, rows)
        self.signals = Signals(model, todo, self.folds, held, rows, settings.seed, settings.ranks)
        known = [name for name, layer in todo.norms.items() if layer is not None]
        self.norms = known if settings.recalibrate else []
        written = {key for fold in self.folds.values() for key in fold.written}
        own = {key for name in self.norms for key, _ in _state(model, name)}
        self.dense = mask.copies(model, sorted(written | own))
        self.last = next(reversed(todo.layers))
        self.doing = "choosing budgets"
        self.shelf = shelf or Shelf("device")
        self.method = Method(settings.solver, penalize_bias, spectra=Spectra(self.shelf))
        self.trained = Responses(self.shelf, room)
        with evaluating(model):
            if settings.importance == "outgoing":
                reading = with_less(lambda: self.signals.importance(self.weights()), self.narrower, settings.ranks)
                self.method = replace(self.method, reading=reading)
            with_less(lambda: self.trained.record(self.signals), self.narrower, settings.ranks)
        if journal is not None:
            self.cause = digest(self.cause, settings.ranks.gather(self.trained.fingerprint()))
        for name, few in rows.items():
            asked = min(settings.max_rows, todo.rows[name])
            if self.trained.rows.get(name) == few < asked:
                self._note(f"{name}: {few} of {asked} rows fit into max_memory")

    def less(self, *names: str) -> None:
        """After memory did not suffice: half the samples of these layers, or of all, and half the inputs at a time."""
        rows = dict(self.signals.rows)
        for name in names or rows:
            rows[name] = min(rows[name], max(rows[name] // 2, LEAST_ROWS))
        self.signals = replace(self.signals, rows=rows)
        self.method.spectra.clear()
        self._note(f"out of memory while {self.doing}: half the samples of {', '.join(names) or 'all layers'}")
        self.narrower()
        now = self.snapshot()
        self.restore()
        with_less(lambda: self.trained.record(self.signals), self.narrower, self.settings.ranks)
        self.restore(now)

    def narrower(self) -> None:
        """After memory did not suffice: half the inputs at a time."""
        self.signals = replace(self.signals, held=self.signals.held.narrower())
        self._note(f"out of memory while {self.doing}: half the inputs at a time")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        log.warning("NetTrim: %s", text)

    def _cause(self, held: Held) -> str:
        """The fingerprint of all that the answers come from, but for the budgets and how many samples fit."""
        flows = {name: str(flow) for name, flow in self.todo.flows.items()}
        inputs = (flatten(replay.batch)[0] for replay in held)
        ranks, settings = self.settings.ranks, repr(replace(self.settings, ranks=ALONE))
        own = digest(
            version("lightning_nettrim"), dict(self.model.state_dict()), settings, flows,
            *(digest(leaves) for leaves in inputs),
        )  # fmt: skip
        return digest(ranks.gather(own))

    def _rows(self, cause: str) -> dict[str, int]:
        """Of each layer, as many as fit; where that is a close call, as many as an earlier run found to fit."""

        def fitting(room: float) -> dict[str, int]:
            most = {name: min(self.settings.max_rows, count) for name, count in self.todo.rows.items()}
            return {name: rows_within(layer, most[name], room) for name, layer in self.todo.layers.items()}

        rows, least, most = (fitting(factor * self.room) for factor in (1, 1 / CLOSE, CLOSE))
        if self.journal is None or least == most:
            return rows
        entry = self.journal.read("how-many-samples", cause)
        if entry is not None and all(least[name] <= few <= most[name] for name, few in entry[1].items()):
            return dict(entry[1])
        self.journal.write("how-many-samples", cause, {}, rows)
        return rows

    @property
    def prunable(self) -> list[str]:
        """Names of the parameters that may get zeros."""
        return [name for layer in self.todo.layers.values() for name in layer.names(self.settings.penalize_bias)]

    def sizes(self) -> dict[str, int]:
        """Prunable weights of each layer."""
        return {name: W[0].numel() * len(W) for name, W in self.weights().items()}

    def weights(self) -> dict[str, Tensor]:
        """``{name: (groups, N, M)}``: the prunable weights of each layer, as trained."""
        bias = self.settings.penalize_bias
        return {name: fold.W if bias else fold.W[:, : fold.layer.inputs] for name, fold in self.folds.items()}

    def restore(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Put the trained weights back, or those of a snapshot."""
        mask.swap(self.model, self.dense if values is None else values)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the layers' parameters as they are now."""
        return mask.copies(self.model, list(self.dense))

    def trained_values(self, name: str) -> dict[str, Tensor]:
        """The parameters of a layer, and of what follows it, as trained."""
        return {key: self.dense[key] for key in self.folds[name].written}

    @contextmanager
    def saved(self) -> Iterator[None]:
        """A `with` after which, by whatever exception, all layers have their trained weights again."""
        try:
            with mask.restored_on_error(self.model, self.dense):
                yield
        except BaseException as error:
            log.warning(
                "%s while %s: all of %s have their trained weights again%s",
                type(error).__name__, self.doing, ", ".join(self.todo.layers),
                "" if self.journal is None else f"; finished layers are in {self.journal.folder}, for the next run",
            )  # fmt: skip
            raise


def _state(model: nn.Module, norm: str) -> list[tuple[str, Tensor]]:
    """The parameters and the running statistics of a BatchNorm, by name."""
    module = model.get_submodule(norm)
    statistics = [(key, value) for key, value in module.named_buffers() if key != "num_batches_tracked"]
    return [(joined(norm, key), value) for key, value in [*module.named_parameters(), *statistics]]
