"""Pruning from Python: `trim` for keyword options, `prune_model` for a `PruningConfig`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_nettrim.calibration.batch import Forward, call, evaluation_mode
from lightning_nettrim.core.pattern import Pattern
from lightning_nettrim.core.precision import matmul_precision
from lightning_nettrim.layers import check_model
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.allocation.named import allocate as allocate_budgets
from lightning_nettrim.pruning.budget import Options
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.from_file import WeightFiles, prune_from_files
from lightning_nettrim.pruning.layer import prune_layer
from lightning_nettrim.pruning.plan_file import plan_to_yaml
from lightning_nettrim.pruning.pruner import prune_network
from lightning_nettrim.pruning.recovery import Recovery
from lightning_nettrim.pruning.results import LayerReport, PruningResult, Trial
from lightning_nettrim.pruning.search import prune_within_drop
from lightning_nettrim.pruning.session_setup import CalibrationSource, calibrate
from lightning_nettrim.pruning.units.allocation import session_groups
from lightning_nettrim.pruning.units.base import UnitSelection
from lightning_nettrim.runtime.distributed import ProcessGroup
from lightning_nettrim.runtime.memory import GIB
from lightning_nettrim.runtime.progress import Progress
from lightning_nettrim.runtime.resume import ResumeStore
from lightning_nettrim.solvers import Solver

CHECKED_INPUTS, CHECKED_ROWS = 64, 256
"""Calibration inputs and rows per layer of `check_pruning`."""


def trim(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    epsilon: float | None = None,
    sparsity: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    latency: float | None = None,
    max_drop: float | None = None,
    mode: Literal["max", "min"] = "max",
    relative: bool = False,
    pattern: str | Pattern = "unstructured",
    select: UnitSelection | None = None,
    round_to: int = 1,
    latency_batch_size: int = 1,
    allocate: Literal["uniform", "epsilon", "global", "magnitude"] | Allocation = "global",
    importance: Literal["outgoing", "equal"] = "outgoing",
    scheme: Literal["cascade", "parallel"] = "cascade",
    solver: Solver | None = None,
    refit: bool = True,
    recover: Recovery | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    per_layer: Options | None = None,
    num_samples: int = 8192,
    max_rows: int | None = None,
    seed: int = 0,
    penalize_bias: bool = False,
    recalibrate_batchnorm: bool = True,
    max_memory: float | None = None,
    offload: Literal["device", "cpu", "disk"] = "cpu",
    on_failure: Literal["magnitude", "dense"] = "magnitude",
    plan: str | Path | None = None,
    metric: Callable[[], float] | None = None,
    folder: str | Path | None = None,
    resume_from: Sequence[str | Path] = (),
    dry_run: bool = False,
    on_layer: Callable[[LayerReport], None] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
    distributed: bool = False,
    forward: Forward = call,
    weights: str | Path | None = None,
    output: str | Path | None = None,
    blocks: str | None = None,
) -> PruningResult:
    """Prune a trained model in place, without retraining it.

    Each layer gets sparse weights that reproduce the response of the trained layer, after its ReLU, on a sample of its
    inputs. If an exception ends it, also Ctrl-C, every layer has its trained weights again.

    Args:
        model: the trained model. Its parameters, and the statistics of its BatchNorms, are changed in place.
        batches: calibration data, iterated once. A tensor is passed as ``model(x)``; a tuple ``(input, target, …)`` as
            ``model(*args)``, with as many elements as ``forward`` requires; a dict as ``model(**dict)``, with the
            entries that ``forward`` names. Tokens that are masked as padding by an argument of a module
            (``attention_mask``, ``src_key_padding_mask`` and the like) are left out.
        epsilon: maximum change of each layer's response, relative to its norm: 0.05 is 5 %. The sparsity results.
        sparsity: fraction of zeros, exact to the weight. The change of the responses results.
        macs: fraction of the network's multiply-accumulates that the pattern ``units`` leaves at most, once compacted.
        parameters: fraction of the network's parameters that the pattern ``units`` leaves at most, once compacted.
        latency: fraction of the time of a forward pass that the pattern ``units`` leaves at most, once compacted, as
            measured on this machine.
        max_drop: maximum drop of the metric (``mode="min"``: rise). The sparsest network within it is searched by
            trials; if there is none, the network stays dense.
        mode: whether a larger (``"max"``) or a smaller (``"min"``) metric is better.
        relative: whether ``max_drop`` is a fraction of the dense network's metric.
        pattern: pattern of the zeros: ``unstructured``, ``per_neuron``, ``neuron``, ``n:m`` as ``2:4``, blocks of
            outputs by inputs as ``4x4``, or a `Pattern`; ``units`` are whole neurons and channels that no layer reads,
            which `compact` removes.
        select: how the pattern ``units`` chooses units; ``None`` is ``Elimination()``, by the errors of the layers that
            read them, and ``Coreset()`` is by sensitivities, without data.
        round_to: the pattern ``units`` keeps multiples of so many units.
        latency_batch_size: batch size at which ``latency`` is measured.
        allocate: how the sparsity is distributed over layers without a budget of their own: ``global``, where it
            changes the network's output least; ``uniform``, the same in each layer; ``epsilon``, to one relative error
            of all responses; ``magnitude``, where the smallest weights are; or an `Allocation`. The total is exact for
            single weights.
        importance: how the error of a neuron is weighted by solvers that minimize the distance of responses:
            ``outgoing``, by the norm of the weights that read it, or ``equal``.
        scheme: ``cascade`` prunes layer after layer on the activations of the pruned network, so that a layer
            compensates for the ones before it; ``parallel`` prunes every layer on the activations of the dense network.
        solver: the method; ``None`` is Cardinality at a sparsity and ADMM, the convex program, at an epsilon.
        refit: refit the weights on their support.
        recover: tunes the kept weights to the dense network's output after pruning, without labels, as
            ``Distillation()``; ``None`` does not.
        targets: layers to prune, by names, globs, ``re:`` patterns or class names; ``None`` is every layer that can be
            pruned.
        ignore: layers to leave dense, by the same keys.
        per_layer: options by the same keys in place of the common ones, as ``{"fc3": {"sparsity": 0.6}}``; the options
            are ``epsilon``, ``sparsity``, ``pattern``, ``refit`` and, as limits for ``allocate``, ``min_sparsity`` and
            ``max_sparsity``.
        num_samples: maximum number of calibration inputs (images, sequences), in each process; a uniform sample of one
            pass over the data.
        max_rows: maximum number of rows per layer (tokens, patches); a uniform sample; ``None`` is ``num_samples``, but
            at least 8192.
        seed: seed of the samples.
        penalize_bias: prune biases like weights, as in the paper.
        recalibrate_batchnorm: re-estimate the running statistics of every BatchNorm after a pruned layer. One that was
            folded into a solved layer gets a new scale and shift with them, so that its output does not change.
        max_memory: GiB of additional memory, from which the rows of a layer and the layers recorded at a time are
            derived: of the model's device or, on the CPU, of the process; ``None`` is half of the available memory.
        offload: where calibration inputs and reference outputs are kept: ``device``, ``cpu``, or ``disk`` for temporary
            files. What exceeds a quarter of ``max_memory`` is written to disk in any case.
        on_failure: what is done if the solve of a layer fails (NaN, infeasible, or an error above its epsilon):
            ``magnitude``, prune it by magnitude and refit, or ``dense``, leave it dense.
        plan: file of a plan that a dry run has written, possibly edited; in place of a budget and of layer choices.
        metric: returns the metric of the model as it is when called, for ``max_drop``.
        folder: where each finished layer is stored, to be found by the next call with the same model, batches and
            options if this one is interrupted; ``None`` stores nothing. The files are removed at the end.
        resume_from: other such folders, from which layers are read.
        dry_run: determine the budgets only: the result has a ``plan``, the model is not changed.
        on_layer: called with the report of each finished layer; its end-to-end error is NaN until all are finished.
        on_trial: called after each trial of ``max_drop``.
        on_progress: called with the name of a phase and the finished fraction of it.
        distributed: all processes of torch's default group call this with the same trained model and options, each
            with batches of its own. Samples stay on their process, ``num_samples`` in each; all processes get the same
            network, to the bit.
        forward: called with the model and a batch, if batches are to be passed in another way.
        weights: safetensors file or folder of a checkpoint with the weights of a model on the meta device, which need
            not fit into memory: one block is loaded at a time. Not with options that need the whole network, such as
            ``allocate="global"``.
        output: file or folder where a copy of ``weights`` with the pruned weights is written; the model and ``weights``
            are not changed.
        blocks: name of the ``nn.ModuleList`` or ``nn.Sequential`` whose elements are loaded one at a time, with
            ``weights``; ``None`` is the largest one with elements of one class. Each of them must read the output of
            the one before.

    Returns:
        The reports, masks and totals; no masks with ``weights``.

    Raises:
        ValueError: for options, models and batches that cannot be used; the model is not changed.
        RuntimeError: if another process has failed, has ended or has other weights; the model is not changed.

    References:
        Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Sci. 2020.
    """
    config = PruningConfig.from_arguments(locals())
    stores: list[ResumeStore] = []

    def resume(processes: ProcessGroup) -> ResumeStore:
        stores.append(ResumeStore(Path(str(folder)), [Path(other) for other in resume_from], processes))
        return stores[-1]

    source = CalibrationSource(batches, forward, distributed)
    common: dict[str, Any] = {"dry_run": dry_run, "on_layer": on_layer, "on_progress": on_progress}
    common["resume"] = None if folder is None else resume
    if weights is None and output is None and blocks is None:
        result = prune_model(model, source, config, metric=metric, on_trial=on_trial, **common)
    elif weights is None or output is None:
        raise ValueError("weights, output: expected both or none of them (blocks= needs both), got one: give both")
    else:
        result = prune_from_files(model, WeightFiles(Path(weights), Path(output), blocks), source, config, **common)
    for store in stores:
        store.remove()
    return result


@matmul_precision("highest")
def prune_model(
    model: nn.Module,
    source: CalibrationSource,
    config: PruningConfig,
    *,
    metric: Callable[[], float] | None = None,
    resume: Callable[[ProcessGroup], ResumeStore] | None = None,
    dry_run: bool = False,
    on_layer: Callable[[LayerReport], None] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> PruningResult:
    """Prune a trained model in place by the options of a `PruningConfig`; see `trim`.

    Args:
        model: the trained model.
        source: of calibration inputs.
        config: the options.
        metric: of the model as it is when called, for ``max_drop``.
        resume: makes the store of finished layers for a group of processes.
        dry_run: determine the budgets only.
        on_layer: called with the report of each finished layer.
        on_trial: called after each trial of ``max_drop``.
        on_progress: called with the name of a phase and the finished fraction of it.

    Raises:
        ValueError: for models and batches that cannot be used; the model is not changed.
        RuntimeError: if another process has failed, has ended or has other weights; the model is not changed.
    """
    start = time.perf_counter()
    if (config.max_drop is None) != (metric is None):
        raise ValueError("max_drop, metric: expected both or none of them, got one: give both")
    if dry_run and config.max_drop is not None:
        raise ValueError("dry_run: expected an epsilon or a sparsity, got max_drop, whose plan depends on its trials")
    check_model(model)
    session = calibrate(model, source, config, resume, Progress(on_progress))
    with session.restored_on_error():
        if metric is None:
            session.run.progress.activity = "determining budgets"
            budgets = allocate_budgets(session, config.sparsity)
            result = PruningResult.of_dry_run(session.plan.skipped)
            if not dry_run:
                result, session = prune_network(session, budgets, on_layer)
            result = replace(result, plan=plan_to_yaml(session.plan, budgets))
        else:
            result = prune_within_drop(session, metric, on_layer, on_trial)
        session.processes.check_identical(dict(chain(model.named_parameters(), model.named_buffers())))
    meter, store = session.run.meter, session.run.resume
    assert meter is not None
    meter.read_peak()
    if store is not None and store.used:
        note = f"{store.used} results are those of an interrupted run"
        result = replace(result, notes=(*result.notes, note), reused=tuple(store.reused))
    return replace(result, seconds=time.perf_counter() - start, peak_memory=meter.peak / GIB)


@matmul_precision("highest")
def check_pruning(model: nn.Module, source: CalibrationSource, config: PruningConfig) -> None:
    """Record a batch and solve the smallest layer, so that what cannot work fails early; the model is not changed.

    Args:
        model: the model, trained or not.
        source: of calibration inputs.
        config: the options.

    Raises:
        ValueError: for models and batches that cannot be used.
        RuntimeError: if another process has failed, has ended or has other weights.
    """
    small = replace(config, num_samples=CHECKED_INPUTS, max_rows=CHECKED_ROWS, max_memory=None, offload="cpu")
    session = calibrate(model, source, small)
    if config.budget.pattern.selects_units:
        session_groups(session)
    layers, budgets = session.plan.layers, session.plan.budgets
    name = min(budgets, key=lambda name: layers[name].parameter.numel())
    budget = replace(budgets[name], sparsity=0.5) if budgets[name].sparsity == 0 else budgets[name]
    with evaluation_mode(model):
        prune_layer(session, name, budget)
