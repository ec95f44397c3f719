"""Pruning of a model that is larger than the memory: its weights are read from files, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.block_sequence import BlockSequence, SegmentForward
from lightning_nettrim.calibration.calibration_set import CalibrationSet
from lightning_nettrim.calibration.memory_model import RESIDENT_COPIES
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.calibration.sampling import sample_inputs
from lightning_nettrim.calibration.streamed_model import OUTSIDE, StreamedModel
from lightning_nettrim.core.precision import matmul_precision
from lightning_nettrim.layers import Layer
from lightning_nettrim.layers.context import LayerContext
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.pruning.allocation.magnitude import MagnitudeAllocation, kept_by_magnitude
from lightning_nettrim.pruning.allocation.named import allocate as allocate_budgets
from lightning_nettrim.pruning.allocation.uniform import UniformAllocation, kept_in_total
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.plan import Plan, coverage_warning
from lightning_nettrim.pruning.plan_file import plan_to_yaml
from lightning_nettrim.pruning.results import LayerReport, PruningResult
from lightning_nettrim.pruning.segments import SegmentPruning
from lightning_nettrim.pruning.session import CalibrationSession
from lightning_nettrim.pruning.session_setup import CalibrationSource
from lightning_nettrim.pruning.solver_states import SolverStates
from lightning_nettrim.pruning.survey import survey
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_nettrim.runtime.memory import DEFAULT_FRACTION, GIB, MemoryMeter, available_memory
from lightning_nettrim.runtime.offload import TensorStore
from lightning_nettrim.runtime.progress import Progress
from lightning_nettrim.runtime.resume import ResumeStore
from lightning_nettrim.runtime.run_context import RunContext
from lightning_nettrim.runtime.tensor_file import TensorFiles

CPU = torch.device("cpu")


@dataclass(frozen=True)
class WeightFiles:
    """The files of a model on the meta device.

    Attributes:
        weights: a safetensors file or the folder of a checkpoint.
        output: where the pruned weights are written, a file or a folder as ``weights``.
        blocks: name of the sequence of blocks; ``None`` finds it.
    """

    weights: Path
    output: Path
    blocks: str | None = None


def check_options(config: PruningConfig, distributed: bool) -> None:
    """Check that options need no more than one block of the model at a time.

    Raises:
        ValueError: naming an option that needs the whole model in memory, and what to use instead.
    """
    usable = config.allocate in ("uniform", "magnitude", UniformAllocation(), MagnitudeAllocation())
    if config.sparsity is not None and not usable:
        raise ValueError(
            f"allocate: expected 'uniform' or 'magnitude' with weights=, got {config.allocate!r}, which measures"
            " effects in the whole network: pass allocate='uniform', or a plan= with the sparsity of each layer"
        )
    if config.budget.pattern.selects_units:
        raise ValueError(
            "pattern: expected single layers with weights=, got 'units', which are chosen in the whole network: choose"
            " another pattern"
        )
    if config.max_drop is not None or config.recover is not None:
        name = "recover" if config.max_drop is None else "max_drop"
        raise ValueError(
            f"{name}: expected None with weights=, got an option that needs the whole network: leave it out"
        )
    if distributed:
        raise ValueError("distributed: expected one process with weights=, got distributed=True: leave it out")


@matmul_precision("highest")
def prune_from_files(
    model: nn.Module,
    files: WeightFiles,
    source: CalibrationSource,
    config: PruningConfig,
    *,
    resume: Callable[[ProcessGroup], ResumeStore] | None = None,
    dry_run: bool = False,
    on_layer: Callable[[LayerReport], None] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> PruningResult:
    """Prune a model on the meta device, block by block, and write its pruned weights to files; see `trim`.

    The trained network's and the pruned network's outputs of a block are the inputs of the next one, so that the
    weights are those that pruning in memory finds.

    Args:
        model: the model, which stays on the meta device.
        files: of its weights.
        source: of calibration inputs.
        config: the options.
        resume: makes the store of finished layers for a group of processes.
        dry_run: determine the budgets only; nothing is written.
        on_layer: called with the report of each finished layer.
        on_progress: called with the name of a phase and the finished fraction of it.

    Raises:
        ValueError: for models, batches, files and options that cannot be used.
    """
    start = time.perf_counter()
    check_options(config, source.distributed)
    limit = available_memory(CPU) * DEFAULT_FRACTION if config.max_memory is None else config.max_memory * GIB
    meter, store = MemoryMeter(CPU), TensorStore(config.offload, limit / 4)
    tensors = TensorFiles(files.weights)
    streamed = StreamedModel(model, tensors, BlockSequence.find(model, files.blocks))
    first = SegmentForward(streamed.sequence, 0, source.forward).first
    with evaluation_mode(model), streamed.loaded(OUTSIDE):
        with streamed.loaded(0):
            calibration_set = sample_inputs(model, source.batches, config.num_samples, config.seed, store, first)
        found = survey(streamed, config, calibration_set, source.forward, store)
        meter.read_peak()
        block = max(streamed.size(index) for index in range(len(streamed.sequence)))
        available = limit - meter.read_peak() - RESIDENT_COPIES * block - (store.capacity - store.size)
        run = RunContext(
            store=store, available=available, meter=meter, resume=resume and resume(SINGLE_PROCESS),
            progress=Progress(on_progress),
        )  # fmt: skip
        if warning := coverage_warning(found.plan):
            run.note(warning)
        shapes = _session_without_weights(model, config, found.plan, calibration_set, run)
        budgets = _budgets(shapes, streamed)
        result = PruningResult.of_dry_run(found.plan.skipped)
        if not dry_run:
            with tensors.copied(files.output) as copy:
                result = SegmentPruning(
                    streamed, config, calibration_set, source.forward, found, budgets, run, on_layer
                ).write_to(copy)
    meter.read_peak()
    if run.resume is not None and run.resume.used:
        run.note(f"{run.resume.used} results are those of an interrupted run")
        result = replace(result, reused=tuple(run.resume.reused))
    return replace(
        result,
        plan=plan_to_yaml(found.plan, budgets),
        notes=tuple(run.notes),
        seconds=time.perf_counter() - start,
        peak_memory=meter.peak / GIB,
    )


def _budgets(shapes: CalibrationSession, streamed: StreamedModel) -> dict[str, Budget]:
    """The budget of every layer by the allocation of the options."""
    sizes, sparsity = shapes.shared_sizes(), shapes.config.sparsity
    if not sizes or sparsity is None or shapes.config.allocate not in ("magnitude", MagnitudeAllocation()):
        return allocate_budgets(shapes, sparsity)
    weights = _Matrices({name: shapes.plan.layers[name] for name in sizes}, streamed, shapes.config.penalize_bias)
    return shapes.budgets_keeping(kept_by_magnitude(weights, kept_in_total(sizes, sparsity), shapes.kept_bounds()))


class _Matrices(Mapping[str, Tensor]):
    """The prunable weights of layers, each of which is read when it is accessed."""

    def __init__(self, layers: Mapping[str, Layer], streamed: StreamedModel, penalize_bias: bool) -> None:
        self._layers, self._streamed, self._penalize_bias = layers, streamed, penalize_bias

    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers[name]
        with self._streamed.loaded_parameters(layer.written_names):
            return layer.matrix() if self._penalize_bias else layer.matrix()[:, : layer.inputs]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _session_without_weights(
    model: nn.Module, config: PruningConfig, plan: Plan, calibration_set: CalibrationSet, run: RunContext
) -> CalibrationSession:
    """A session of the whole plan that knows the sizes of all layers, but has no values, for an allocation."""
    folded = {
        name: FoldedLayer.create(layer, LayerContext(1), model, config.penalize_bias)
        for name, layer in plan.layers.items()
    }
    activations = Activations(model, plan.layers, plan.contexts, folded, calibration_set, plan.rows, config.seed)
    reference, states = ReferenceOutputs(run.store, run.available), SolverStates(run.store)
    return CalibrationSession(model, config, plan, activations, reference, {}, (), {}, states, run)
