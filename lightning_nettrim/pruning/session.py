"""The calibration session: a trained model with its plan, calibration set and reference outputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.batch import Forward, call, evaluation_mode
from lightning_nettrim.calibration.memory_model import MIN_ROWS, max_rows_within, resident_bytes
from lightning_nettrim.calibration.nested import flatten
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.calibration.sampling import CalibrationSet, sample_inputs
from lightning_nettrim.layers import joined, masking
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.plan import Plan, coverage_warning, make_plan
from lightning_nettrim.pruning.plan_file import select_layers
from lightning_nettrim.pruning.solver_states import SolverStates
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from lightning_nettrim.runtime.fingerprint import fingerprint
from lightning_nettrim.runtime.memory import DEFAULT_FRACTION, GIB, MemoryMeter, available_memory, retry_with_less
from lightning_nettrim.runtime.offload import TensorStore
from lightning_nettrim.runtime.progress import Progress
from lightning_nettrim.runtime.resume import ResumeStore
from lightning_nettrim.runtime.run_context import RunContext
from lightning_nettrim.solvers import Solver

log = logging.getLogger(__name__)

T = TypeVar("T")

MEMORY_VARIATION = 1.1
"""Factor by which the available memory differs between two equal runs."""

COMPUTED_BY = ("scheme", "solver", "seed", "penalize_bias", "importance", "recalibrate_batchnorm", "on_failure")
"""Options, beside the budgets, that change the solution of a layer."""


@dataclass(frozen=True, eq=False)
class CalibrationSource:
    """Where calibration inputs come from.

    Attributes:
        batches: iterated once.
        forward: runs a batch through a model.
        distributed: whether each process of torch's default group has batches of its own.
    """

    batches: Iterable[Any]
    forward: Forward = call
    distributed: bool = False


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

    def weights(self) -> dict[str, Tensor]:
        """``{name: (groups, N, M)}``: the prunable weights of each layer, as trained."""
        bias = self.config.penalize_bias
        return {name: f.W if bias else f.W[:, : f.layer.inputs] for name, f in self.folded_layers.items()}

    def sizes(self) -> dict[str, int]:
        """Number of prunable weights of each layer."""
        return {name: W[0].numel() * len(W) for name, W in self.weights().items()}

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
        return {key: self.dense[key] for key in self.folded_layers[name].written_names}

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


def calibrate(
    model: nn.Module,
    source: CalibrationSource,
    config: PruningConfig,
    resume: Callable[[ProcessGroup], ResumeStore] | None = None,
    progress: Progress | None = None,
) -> CalibrationSession:
    """Sample the inputs, trace the model, and record the responses of its layers.

    Args:
        model: the trained model.
        source: of calibration inputs.
        config: the options.
        resume: makes the store of finished layers for a group of processes.
        progress: what is being done.

    Raises:
        ValueError: for models and batches that cannot be used.
        RuntimeError: if another process has failed, has ended or has other weights.
    """
    device = next(model.parameters()).device
    limit = available_memory(device) * DEFAULT_FRACTION if config.max_memory is None else config.max_memory * GIB
    meter = MemoryMeter(device)
    kept_in_budget = config.offload == "device" or device.type == "cpu"
    store = TensorStore(config.offload, limit / 4 if kept_in_budget else math.inf)
    processes = TorchProcessGroup.of(model) if source.distributed else SINGLE_PROCESS
    processes.check_identical(dict(model.named_parameters()))
    processes.broadcast(model.buffers())
    with processes.raise_together():
        calibration_set = sample_inputs(model, source.batches, config.num_samples, config.seed, store, source.forward)
    meter.read_peak()  # the sampling's temporaries are freed by now
    plan = make_plan(model, calibration_set, select_layers(config, model), processes)
    unused = store.capacity - store.size if kept_in_budget else 0.0
    rows = {name: min(count, config.rows_limit) for name, count in plan.rows.items()}
    resident = resident_bytes(plan.layers, rows, unused, config.scheme == "parallel")
    available = min(processes.gather(limit - meter.read_peak() - resident))
    run = RunContext(
        processes, store, available, meter, resume and resume(processes), progress or Progress()
    )  # fmt: skip
    session = start_session(model, config, plan, calibration_set, run)
    if warning := coverage_warning(plan):
        run.note(warning)
    return session


def start_session(
    model: nn.Module, config: PruningConfig, plan: Plan, calibration_set: CalibrationSet, run: RunContext
) -> CalibrationSession:
    """The session of a plan: record the responses of all layers, in as many rows as the memory allows."""
    folded_layers = {
        name: FoldedLayer.create(layer, plan.contexts[name], model, config.penalize_bias)
        for name, layer in plan.layers.items()
    }
    cause = "" if run.resume is None else _cause(model, config, plan, calibration_set, run.processes)
    rows = _rows(config, plan, run, cause)
    batchnorms = [name for name, layer in plan.batchnorms.items() if layer is not None]
    batchnorms = batchnorms if config.recalibrate_batchnorm else []
    changed = {key for folded in folded_layers.values() for key in folded.written_names}
    changed |= {key for name in batchnorms for key in _batchnorm_state(model, name)}
    activations = Activations(
        model, plan.layers, plan.contexts, folded_layers, calibration_set, rows, config.seed, run.processes
    )  # fmt: skip
    session = CalibrationSession(
        model, config, plan, activations,
        reference=ReferenceOutputs(run.store, run.available),
        dense=masking.clone(model, sorted(changed)),
        batchnorms=tuple(batchnorms),
        importance={},
        solver_states=SolverStates(run.store),
        run=run,
    )  # fmt: skip
    run.progress.activity = "recording the responses of the trained network"
    with evaluation_mode(model):
        if config.importance == "outgoing":
            weights = session.weights()
            importance, session = retried(
                session, lambda s: s.activations.outgoing_importance(weights), with_smaller_batches
            )
            session = replace(session, importance=importance)
        _, session = retried(session, lambda s: s.reference.record(s.activations), with_smaller_batches)
    if run.resume is not None:
        recorded = run.processes.gather(session.reference.fingerprint())
        session = replace(session, fingerprint=fingerprint(fingerprint(cause, rows), recorded))
    for name, count in rows.items():
        asked = min(config.rows_limit, plan.rows[name])
        if session.reference.rows.get(name) == count < asked:
            run.note(f"{name}: {count} of {asked} rows fit into max_memory")
    return session


def subset(session: CalibrationSession, inputs: int, solver: Solver) -> CalibrationSession:
    """A session of the same trained model on about so many of its inputs, with another solver and without resuming."""
    session.restore()
    config = replace(session.config, solver=solver, recover=None, max_rows=min(inputs, session.config.rows_limit))
    first = session.activations.first_inputs(inputs)
    rows = {name: min(inputs, count) for name, count in session.activations.rows.items()}
    run = replace(session.run, meter=None, resume=None, cache={})
    smaller = replace(
        session,
        config=config,
        activations=replace(first, rows=rows),
        reference=ReferenceOutputs(run.store, run.available),
        solver_states=SolverStates(run.store),
        run=run,
    )
    with evaluation_mode(session.model):
        return retried(smaller, lambda s: s.reference.record(s.activations), with_smaller_batches)[1]


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


def _cause(
    model: nn.Module, config: PruningConfig, plan: Plan, calibration_set: CalibrationSet, processes: ProcessGroup
) -> str:
    """Fingerprint of everything the solutions depend on, except the budgets and the number of rows."""
    options = {name: repr(getattr(config, name)) for name in COMPUTED_BY} | {"max_rows": config.rows_limit}
    contexts = {name: str(context) for name, context in plan.contexts.items()}
    inputs = (fingerprint(flatten(batch.batch)[0]) for batch in calibration_set)
    own = fingerprint(version("lightning_nettrim"), dict(model.state_dict()), options, contexts, *inputs)
    return fingerprint(processes.gather(own))


def _rows(config: PruningConfig, plan: Plan, run: RunContext, cause: str) -> dict[str, int]:
    """Rows of each layer that fit into memory; where this is close, as many as an interrupted run has found to fit."""

    def fitting(available: float) -> dict[str, int]:
        most = {name: min(config.rows_limit, count) for name, count in plan.rows.items()}
        return {name: max_rows_within(layer, most[name], available) for name, layer in plan.layers.items()}

    rows, fewest, most = (fitting(factor * run.available) for factor in (1, 1 / MEMORY_VARIATION, MEMORY_VARIATION))
    if run.resume is None or fewest == most:
        return rows
    entry = run.resume.read("rows", cause)
    if entry is not None and all(fewest[name] <= count <= most[name] for name, count in entry[1].items()):
        return dict(entry[1])
    run.resume.write("rows", cause, {}, rows)
    return rows


def _batchnorm_state(model: nn.Module, batchnorm: str) -> list[str]:
    """Names of the parameters and running statistics of a BatchNorm."""
    module = model.get_submodule(batchnorm)
    buffers = [key for key, _ in module.named_buffers() if key != "num_batches_tracked"]
    return [joined(batchnorm, key) for key in [*(key for key, _ in module.named_parameters()), *buffers]]
