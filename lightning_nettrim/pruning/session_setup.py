"""How a calibration session is made: sampling, tracing, planning, recording the reference outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

from torch import Tensor, nn

from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.batch import CalibrationBatch, Forward, call, evaluation_mode, inputs_are_independent
from lightning_nettrim.calibration.calibration_set import CalibrationSet
from lightning_nettrim.calibration.memory_model import layer_bytes, max_rows_within, resident_bytes
from lightning_nettrim.calibration.nested import common_length, flatten
from lightning_nettrim.calibration.output_cache import OutputCache
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.calibration.sampling import sample_inputs
from lightning_nettrim.layers import joined, masking
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.plan import Plan, coverage_warning, make_plan
from lightning_nettrim.pruning.plan_file import select_layers
from lightning_nettrim.pruning.recovery import tuned_parameters
from lightning_nettrim.pruning.session import CalibrationSession, retried, with_smaller_batches
from lightning_nettrim.pruning.solver_states import SolverStates
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from lightning_nettrim.runtime.fingerprint import fingerprint
from lightning_nettrim.runtime.memory import DEFAULT_FRACTION, GIB, MemoryMeter, available_memory
from lightning_nettrim.runtime.offload import TensorStore
from lightning_nettrim.runtime.progress import Progress
from lightning_nettrim.runtime.resume import ResumeStore
from lightning_nettrim.runtime.run_context import RunContext
from lightning_nettrim.runtime.sharded import is_sharded, reshard

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
    reshard(model)
    if is_sharded(model) and not source.distributed:
        raise ValueError(
            "distributed: expected True for a model whose parameters are divided among processes, got False"
        )
    if config.recover is not None:
        config.recover.check(model)
    processes = TorchProcessGroup.of(model) if source.distributed else SINGLE_PROCESS
    processes.check_identical(dict(model.named_parameters()))
    processes.broadcast(model.buffers())
    calibration_set = _sample(model, source, config, store, processes)
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


def _sample(
    model: nn.Module, source: CalibrationSource, config: PruningConfig, store: TensorStore, processes: ProcessGroup
) -> CalibrationSet:
    """The calibration set of this process.

    If the parameters of the model are divided among processes, these run all forward passes together: it is determined
    on their first batches whether batches can be split, and all get equally many.
    """
    batches, independent = iter(source.batches), None
    if is_sharded(model):
        with processes.raise_together():
            first = list(islice(batches, 1))
        lengths = [common_length(batch) or 0 for batch in first]
        batches, independent = chain(first, batches), processes.all(min(lengths, default=0) > 1)
        if independent:
            batch = CalibrationBatch(first[0], source.forward)
            independent = processes.all(inputs_are_independent(model, batch, lengths[0]))
    with processes.raise_together():
        calibration_set = sample_inputs(
            model, batches, config.num_samples, config.seed, store, source.forward, independent
        )
    return calibration_set.run_together(processes) if is_sharded(model) else calibration_set


def start_session(
    model: nn.Module,
    config: PruningConfig,
    plan: Plan,
    calibration_set: CalibrationSet,
    run: RunContext,
    importance: Mapping[str, Tensor] | None = None,
) -> CalibrationSession:
    """The session of a plan: record the responses of all layers, in as many rows as the memory allows.

    Args:
        model: the trained model.
        config: the options.
        plan: the layers.
        calibration_set: sampled inputs.
        run: environment of the run.
        importance: of the outputs of layers, if it is known.
    """
    folded_layers = {
        name: FoldedLayer.create(layer, plan.contexts[name], model, config.penalize_bias)
        for name, layer in plan.layers.items()
    }
    key = "" if run.resume is None else _key(model, config, plan, calibration_set, run.processes)
    rows = _rows(config, plan, run, key)
    needed = min(run.available, max(layer_bytes(layer, rows[name]) for name, layer in plan.layers.items()))
    capacity = 0.0 if is_sharded(model) else (run.available - needed) / 2
    cache = OutputCache(model, plan.layers, plan.contexts, plan.batchnorms, capacity)
    calibration_set, run = calibration_set.with_cache(cache), replace(run, available=(run.available + needed) / 2)
    batchnorms = [name for name, layer in plan.batchnorms.items() if layer is not None]
    batchnorms = batchnorms if config.recalibrate_batchnorm else []
    changed = {key for folded in folded_layers.values() for key in folded.written_names}
    changed |= {key for name in batchnorms for key in _batchnorm_state(model, name)}
    if config.recover is not None:
        changed |= set(tuned_parameters(model, plan.layers))
    activations = Activations(
        model, plan.layers, plan.contexts, folded_layers, calibration_set, rows, config.seed, run.processes
    )  # fmt: skip
    session = CalibrationSession(
        model, config, plan, activations,
        reference=ReferenceOutputs(run.store, run.available),
        dense=masking.clone(model, sorted(changed)),
        batchnorms=tuple(batchnorms),
        importance=importance or {},
        solver_states=SolverStates(run.store),
        run=run,
    )  # fmt: skip
    run.progress.activity = "recording the responses of the trained network"
    with evaluation_mode(model):
        if config.importance == "outgoing" and importance is None:
            weights = session.weights()
            found, session = retried(
                session, lambda s: s.activations.outgoing_importance(weights), with_smaller_batches
            )
            session = replace(session, importance=found)
        _, session = retried(session, lambda s: s.reference.record(s.activations), with_smaller_batches)
    if run.resume is not None:
        recorded = run.processes.gather(session.reference.fingerprint())
        session = replace(session, fingerprint=fingerprint(fingerprint(key, rows), recorded))
    for name, count in rows.items():
        asked = min(config.rows_limit, plan.rows[name])
        if session.reference.rows.get(name) == count < asked:
            run.note(f"{name}: {count} of {asked} rows fit into max_memory")
    return session


def _key(
    model: nn.Module, config: PruningConfig, plan: Plan, calibration_set: CalibrationSet, processes: ProcessGroup
) -> str:
    """Fingerprint of everything the solutions depend on, except the budgets and the number of rows."""
    options = {name: repr(getattr(config, name)) for name in COMPUTED_BY} | {"max_rows": config.rows_limit}
    contexts = {name: str(context) for name, context in plan.contexts.items()}
    inputs = (fingerprint(flatten(batch.batch)[0]) for batch in calibration_set)
    state = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    own = fingerprint(version("lightning_nettrim"), state, options, contexts, *inputs)
    return fingerprint(processes.gather(own))


def _rows(config: PruningConfig, plan: Plan, run: RunContext, key: str) -> dict[str, int]:
    """Rows of each layer that fit into memory; where this is close, as many as an interrupted run has found to fit."""

    def fitting(available: float) -> dict[str, int]:
        most = {name: min(config.rows_limit, count) for name, count in plan.rows.items()}
        return {name: max_rows_within(layer, most[name], available) for name, layer in plan.layers.items()}

    rows, fewest, most = (fitting(factor * run.available) for factor in (1, 1 / MEMORY_VARIATION, MEMORY_VARIATION))
    if run.resume is None or fewest == most:
        return rows
    entry_name = f"rows of {next(iter(rows))}"
    entry = run.resume.read(entry_name, key)
    if entry is not None and all(fewest[name] <= count <= most[name] for name, count in entry[1].items()):
        return dict(entry[1])
    run.resume.write(entry_name, key, {}, rows)
    return rows


def _batchnorm_state(model: nn.Module, batchnorm: str) -> list[str]:
    """Names of the parameters and running statistics of a BatchNorm."""
    module = model.get_submodule(batchnorm)
    buffers = [key for key, _ in module.named_buffers() if key != "num_batches_tracked"]
    return [joined(batchnorm, key) for key in [*(key for key, _ in module.named_parameters()), *buffers]]
