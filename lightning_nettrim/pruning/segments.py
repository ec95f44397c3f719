"""Pruning of the segments of a model whose weights are in files, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from lightning_nettrim.calibration.batch import Forward
from lightning_nettrim.calibration.block_sequence import SegmentForward, SegmentOutputs
from lightning_nettrim.calibration.calibration_set import CalibrationSet
from lightning_nettrim.calibration.stored_batch import StoredBatch
from lightning_nettrim.calibration.streamed_model import StreamedModel
from lightning_nettrim.layers import masking
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.layer import LayerOutcome
from lightning_nettrim.pruning.pruner import Budgets, finish_batchnorms, measure_errors, prune_layers, reestimate_after
from lightning_nettrim.pruning.results import LayerReport, PruningResult
from lightning_nettrim.pruning.session import CalibrationSession
from lightning_nettrim.pruning.session_setup import start_session
from lightning_nettrim.pruning.steps import with_memory_retries, with_progress, with_reports, with_resume
from lightning_nettrim.pruning.survey import Survey
from lightning_nettrim.runtime.fingerprint import fingerprint
from lightning_nettrim.runtime.progress import Progress
from lightning_nettrim.runtime.run_context import RunContext
from lightning_nettrim.runtime.tensor_file import TensorCopy


class SegmentPruning:
    """Prunes the segments of a model in order, each on the outputs of the ones before it.

    Two networks pass through the segments: the trained one, whose responses are the reference, and the pruned one, on
    whose inputs a cascade solves and the errors are measured. What precedes the blocks stays loaded and is pruned in
    the first segment; its trained weights are put back whenever the trained network runs.

    Args:
        streamed: the model, in evaluation mode; what is outside of the blocks must be loaded.
        config: the options.
        calibration_set: sampled inputs.
        forward: function that runs a batch through the model.
        found: the plan and the importances.
        budgets: of all layers.
        run: environment of the run.
        on_layer: called with the report of each finished layer.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        config: PruningConfig,
        calibration_set: CalibrationSet,
        forward: Forward,
        found: Survey,
        budgets: Budgets,
        run: RunContext,
        on_layer: Callable[[LayerReport], None] | None,
    ) -> None:
        self._streamed, self._config, self._run, self._on_layer = streamed, config, run, on_layer
        self._calibration_set, self._forward, self._found, self._budgets = calibration_set, forward, found, budgets
        self._outer: dict[str, tuple[Tensor, Tensor]] = {}  # trained and pruned values of what precedes the blocks
        self._previous: str | None = None  # name of the layer that was pruned last
        self._key = ""  # fingerprint of all layers that have been pruned
        self._prunable, self._all = _Zeros(), _Zeros()

    def write_to(self, copy: TensorCopy) -> PruningResult:
        """Prune all segments, and write the values of each to the copy of the files when it is finished."""
        result = PruningResult.of_dry_run(self._found.plan.skipped)
        trained: list[StoredBatch] | None = None
        pruned: list[StoredBatch] | None = None
        for index in range(len(self._found.segments)):
            with self._streamed.loaded(index):
                forward = SegmentForward(self._streamed.sequence, index, self._forward)
                trained_inputs = self._calibration_set.paired(trained, forward)
                pruned_inputs = trained_inputs if pruned is None else self._calibration_set.paired(pruned, forward)
                own, trained, pruned = self._prune(index, trained_inputs, pruned_inputs, copy)
                if own is not None:
                    result = replace(own, reports=result.reports + own.reports, skipped=result.skipped)
                self._all.count(self._parameters(index))
        self._all.count(self._parameters(None))
        return replace(result, sparsity=self._prunable.fraction, model_sparsity=self._all.fraction)

    def _prune(
        self, index: int, trained: CalibrationSet, pruned: CalibrationSet, copy: TensorCopy
    ) -> tuple[PruningResult | None, list[StoredBatch], list[StoredBatch]]:
        """Prune one segment in place; the result if it has layers, and the outputs of the trained and pruned one."""
        plan, model, budgets = self._found.segments[index], self._streamed.model, self._budgets
        self._assign_outer(0)
        if not plan.layers:
            outputs = self._outputs(index, trained)
            self._assign_outer(1)
            return None, outputs, self._outputs(index, pruned)
        count = len(self._found.segments)
        progress = Progress(lambda phase, part: self._run.progress.report(phase, (index + part) / count))
        run = replace(self._run, progress=progress)
        session = start_session(model, self._config, plan, trained, run, self._found.importance)
        cache = session.activations.calibration_set.cache
        assert cache is not None
        outputs = self._outputs(index, trained.with_cache(cache))
        self._assign_outer(1)
        key = fingerprint(self._key, session.fingerprint, self._found.importance) if session.fingerprint else ""
        pruned = pruned.with_cache(cache)
        on_pruned = replace(session.activations, calibration_set=pruned)
        session = replace(session, fingerprint=key)
        if self._config.scheme == "cascade":
            session = replace(session, activations=on_pruned)
            self._reestimate_before(session)
        step = with_reports(with_progress(with_resume(with_memory_retries)), self._on_layer)
        outcomes, session = prune_layers(session, budgets, step, self._previous)
        rows = session.activations.rows
        session = replace(session, activations=replace(on_pruned, rows=rows))
        if self._config.scheme == "parallel":
            self._reestimate_before(session)
        finish_batchnorms(session, budgets, outcomes)
        reports = tuple(outcome.report for outcome in outcomes.values())
        result, session = measure_errors(session, replace(PruningResult.of_dry_run(()), reports=reports))
        self._finish(index, session, outcomes, copy)
        return result, outputs, self._outputs(index, pruned)

    def _finish(
        self, index: int, session: CalibrationSession, outcomes: dict[str, LayerOutcome], copy: TensorCopy
    ) -> None:
        """Write what has changed, and keep what the next segments need of it."""
        values = session.snapshot()
        for name, value in values.items():
            for alias in self._streamed.names_in_files(name):
                copy.write(alias, value)
            if index == 0 and self._streamed.sequence.index(name) is None:
                self._outer[name] = session.dense[name], value
        self._prunable.count(values[name] for name in session.prunable_parameters)
        self._previous = session.last
        self._key = fingerprint(session.fingerprint, {name: outcome.values for name, outcome in outcomes.items()})

    def _reestimate_before(self, session: CalibrationSession) -> None:
        """Re-estimate the BatchNorms between the layer that was pruned last and the first one of the segment."""
        if self._previous is not None:
            reestimate_after(session, self._previous, self._budgets)

    def _outputs(self, index: int, inputs: CalibrationSet) -> list[StoredBatch]:
        """The outputs of a segment, which the next one reads; none of the last one."""
        kept = SegmentOutputs(self._run.store)
        for batch in kept.kept(inputs) if index < len(self._streamed.sequence) else ():
            batch(self._streamed.model)
        return kept.values

    def _assign_outer(self, which: int) -> None:
        """Assign the trained (0) or the pruned (1) values of what precedes the blocks."""
        masking.assign(self._streamed.model, {name: pair[which] for name, pair in self._outer.items()})

    def _parameters(self, part: int | None) -> list[Tensor]:
        """The parameters of a part of the model."""
        parameters = self._streamed.model.named_parameters()
        return [parameter for name, parameter in parameters if self._streamed.sequence.index(name) == part]


class _Zeros:
    """Counts the zeros of tensors, of which only one need exist at a time."""

    def __init__(self) -> None:
        self._size = self._zeros = 0

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Add the entries of tensors."""
        for tensor in tensors:
            self._size += tensor.numel()
            self._zeros += tensor.numel() - int(tensor.count_nonzero())

    @property
    def fraction(self) -> float:
        """Fraction of zeros; 0 if there are no entries."""
        return self._zeros / self._size if self._size else 0.0
