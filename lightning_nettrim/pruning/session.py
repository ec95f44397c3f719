"""The calibration session: a trained model with its plan, calibration set and reference outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor, nn

from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.memory_model import MIN_ROWS
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.layers import masking
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.plan import Plan
from lightning_nettrim.pruning.solver_states import SolverStates
from lightning_nettrim.runtime.distributed import ProcessGroup
from lightning_nettrim.runtime.memory import retry_with_less
from lightning_nettrim.runtime.run_context import RunContext
from lightning_nettrim.runtime.sharded import full

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PrunableWeights(Mapping[str, Tensor]):
    """``{name: (groups, N, M)}``: the trained weights of layers, each of which is gathered when it is read.

    Attributes:
        folded_layers: the layers.
        bias: whether the bias is the last row.
    """

    folded_layers: Mapping[str, FoldedLayer]
    bias: bool

    def __getitem__(self, name: str) -> Tensor:
        """The weights of a layer."""
        folded = self.folded_layers[name]
        return folded.W if self.bias else folded.W[:, : folded.layer.inputs]

    def __iter__(self) -> Iterator[str]:
        """The names of the layers."""
        return iter(self.folded_layers)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.folded_layers)


@dataclass(frozen=True, eq=False)
class CalibrationSession:
    """A trained model with everything that pruning it to any budgets needs. It is made by `calibrate`.

    Attributes:
        model: the model; its parameters are the trained ones when a session is made.
        config: the options.
        plan: the layers.
        activations: of the layers, on the calibration set.
        reference: the responses of the trained network.
        dense: copies of all parameters and buffers that pruning changes, as trained.
        batchnorms: names of the BatchNorms whose statistics are re-estimated.
        importance: ``{name: (groups, 1, M)}`` weights of the outputs' errors, of the layers where they are not equal.
        solver_states: of the layers whose inputs are those of the trained network.
        run: processes, memory, progress.
        fingerprint: of everything that the solutions of layers depend on, except the budgets.
    """

    model: nn.Module
    config: PruningConfig
    plan: Plan
    activations: Activations
    reference: ReferenceOutputs
    dense: Mapping[str, Tensor]
    batchnorms: tuple[str, ...]
    importance: Mapping[str, Tensor]
    solver_states: SolverStates
    run: RunContext = field(default_factory=RunContext)
    fingerprint: str = ""

    @property
    def processes(self) -> ProcessGroup:
        """The processes that take part."""
        return self.run.processes

    @property
    def folded_layers(self) -> Mapping[str, FoldedLayer]:
        """The layers with the BatchNorms that follow folded in, as trained."""
        return self.activations.folded_layers

    @property
    def last(self) -> str:
        """Name of the layer that is executed last."""
        return next(reversed(self.plan.layers))

    @property
    def prunable_parameters(self) -> list[str]:
        """Names of the parameters that get zeros."""
        penalize_bias = self.config.penalize_bias
        return [name for layer in self.plan.layers.values() for name in layer.parameter_names(penalize_bias)]

    def weights(self) -> Mapping[str, Tensor]:
        """``{name: (groups, N, M)}``: the prunable weights of each layer, as trained."""
        return PrunableWeights(self.folded_layers, self.config.penalize_bias)

    def sizes(self) -> dict[str, int]:
        """Number of prunable weights of each layer."""
        bias = self.config.penalize_bias
        return {
            name: f.trained.numel() if bias else f.layer.groups * f.layer.inputs * f.layer.outputs
            for name, f in self.folded_layers.items()
        }

    def shared_sizes(self) -> dict[str, int]:
        """Number of prunable weights of each layer that shares the common sparsity."""
        sizes = self.sizes()
        return {name: sizes[name] for name in self.plan.shared if self.plan.budgets[name].epsilon is None}

    def kept_bounds(self) -> dict[str, tuple[int, int]]:
        """How many weights of each layer that shares the common sparsity may be kept, at least and at most."""
        bounds = {}
        for name, size in self.shared_sizes().items():
            budget = self.plan.budgets[name]
            least, most = (size - round(limit * size) for limit in (budget.max_sparsity, budget.min_sparsity))
            bounds[name] = max(least, 1), most
        return bounds

    def budgets_keeping(self, kept: Mapping[str, int]) -> dict[str, Budget]:
        """The budgets of the plan with so many weights kept of some layers."""
        sizes, own = self.sizes(), self.plan.budgets
        return own | {name: replace(own[name], sparsity=1 - count / sizes[name]) for name, count in kept.items()}

    def restore(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Copy the trained weights, or those of a snapshot, into the model."""
        masking.assign(self.model, self.dense if values is None else values)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the parameters and buffers that pruning changes."""
        return masking.clone(self.model, list(self.dense))

    def dense_values(self, name: str) -> dict[str, Tensor]:
        """The parameters of a layer, and of the BatchNorm that is solved with it, as trained."""
        return {key: full(self.dense[key]) for key in self.folded_layers[name].written_names}

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """A `with` after which, if any exception ends it, all layers have their trained weights again."""
        try:
            with masking.restored_on_error(self.model, self.dense):
                yield
        except BaseException as error:
            resume = self.run.resume
            log.warning(
                "%s while %s: all of %s have their trained weights again%s",
                type(error).__name__, self.run.progress.activity, ", ".join(self.plan.layers),
                "" if resume is None else f"; finished layers are in {resume.folder}, for the next run",
            )  # fmt: skip
            raise


def retried(
    session: CalibrationSession,
    attempt: Callable[[CalibrationSession], T],
    reduce: Callable[[CalibrationSession], CalibrationSession],
) -> tuple[T, CalibrationSession]:
    """The result of an attempt, made again with a reduced session if there is not enough memory, and that session."""
    return retry_with_less(attempt, session, reduce, session.processes)


def with_smaller_batches(session: CalibrationSession) -> CalibrationSession:
    """The same session with half the inputs at a time."""
    smaller = session.activations.calibration_set.with_smaller_batches()
    if smaller.cache is not None:
        smaller.cache.disable()
    session.run.note(f"out of memory while {session.run.progress.activity}: half the inputs at a time")
    return replace(session, activations=replace(session.activations, calibration_set=smaller))


def with_fewer_rows(session: CalibrationSession, *names: str) -> CalibrationSession:
    """The same session with half the rows of some layers, or of all, and half the inputs at a time."""
    rows = dict(session.activations.rows)
    for name in names or rows:
        rows[name] = min(rows[name], max(rows[name] // 2, MIN_ROWS))
    session.run.note(
        f"out of memory while {session.run.progress.activity}: half the rows of {', '.join(names) or 'all layers'}"
    )
    reduced = replace(
        session,
        activations=replace(session.activations, rows=rows),
        solver_states=SolverStates(session.run.store),
        reference=ReferenceOutputs(session.run.store, session.run.available),
    )
    reduced, now = with_smaller_batches(reduced), session.snapshot()
    reduced.restore()
    _, reduced = retried(reduced, lambda s: s.reference.record(s.activations), with_smaller_batches)
    reduced.restore(now)
    return reduced
