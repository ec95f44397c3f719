"""A pass over a model whose weights are in files: what its layers are, and what follows and reads each of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lightning_nettrim.calibration.activations import COMPARED_ROWS, Activations, importance_of_reads
from lightning_nettrim.calibration.batch import Forward
from lightning_nettrim.calibration.block_sequence import SegmentForward, SegmentOutputs
from lightning_nettrim.calibration.calibration_set import CalibrationSet
from lightning_nettrim.calibration.stored_batch import StoredBatch
from lightning_nettrim.calibration.streamed_model import StreamedModel
from lightning_nettrim.calibration.tracing import ForwardTrace, trace_forward
from lightning_nettrim.layers import Layer
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.plan import Plan, plan_of_trace
from lightning_nettrim.pruning.plan_file import select_layers
from lightning_nettrim.runtime.offload import TensorStore


@dataclass(frozen=True, eq=False)
class Survey:
    """What is known of a model before its first layer is pruned.

    Attributes:
        plan: of the whole model.
        segments: the part of the plan in each segment: what precedes the first block and that block, each other block,
            and what follows the last one.
        importance: of the outputs of layers, as `Activations.outgoing_importance` finds them; a layer of the next block
            counts as a reader, one beyond it does not.
    """

    plan: Plan
    segments: tuple[Plan, ...]
    importance: dict[str, Tensor]


def survey(
    streamed: StreamedModel,
    config: PruningConfig,
    calibration_set: CalibrationSet,
    forward: Forward,
    store: TensorStore,
) -> Survey:
    """Trace the segments of a model one after the other; what is outside of the blocks must be loaded.

    Args:
        streamed: the model, in evaluation mode.
        config: the options.
        calibration_set: sampled inputs.
        forward: function that runs a batch through the model.
        store: where the outputs of a segment are kept.

    Raises:
        ValueError: for models and batches that cannot be used.
    """
    model, sequence = streamed.model, streamed.sequence
    selection = select_layers(config, model)
    layers, budgets, skipped = selection.find(model)
    _check_aliases(streamed, layers)
    merged, traces = ForwardTrace({}, {}, [], {}, {}), []
    reads: dict[str, list[Tensor]] = {}
    responses: dict[str, Tensor] = {}
    outputs: list[StoredBatch] | None = None
    for index in range(len(sequence) + 1):
        inputs = calibration_set.paired(outputs, SegmentForward(sequence, index, forward))
        with streamed.loaded(index):
            present = {name: layer for name, layer in layers.items() if sequence.index(name) in (None, index)}
            kept = SegmentOutputs(store)
            last = index == len(sequence)
            trace = trace_forward(model, present, inputs if last else kept.kept(inputs))
            trace = _without(trace, merged)
            if config.importance == "outgoing" and trace.contexts:
                own = {name: layers[name] for name in trace.contexts}
                found, responses = _reads(streamed, config, own, trace, inputs, responses)
                for name, squares in found.items():
                    reads[name] = [*reads.get(name, []), *squares]
            if last:
                streamed.check_sequence(replace(calibration_set[0], forward=forward), inputs[0](model))
        merged = _joined(merged, trace)
        traces.append(trace)
        outputs = kept.values
    plan = plan_of_trace(model, selection, (layers, budgets, skipped), merged)
    return Survey(plan, tuple(_part(plan, trace) for trace in traces), importance_of_reads(reads))


def _check_aliases(streamed: StreamedModel, layers: dict[str, Layer]) -> None:
    """Check that no block shares a layer with another part."""
    index = streamed.sequence.index
    for name, layer in layers.items():
        if shared := [alias.name for alias in layer.aliases if index(alias.name) != index(name)]:
            raise ValueError(
                f"{name}: expected a layer of one block, got one that is shared with {', '.join(shared)}: ignore it, or"
                " prune the model in memory"
            )


def _reads(
    streamed: StreamedModel,
    config: PruningConfig,
    layers: dict[str, Layer],
    trace: ForwardTrace,
    inputs: CalibrationSet,
    earlier: dict[str, Tensor],
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """The weights of layers that read the responses of others in their segment, or in the one before."""
    folded = {
        name: FoldedLayer.create(layer, trace.contexts[name], streamed.model, config.penalize_bias)
        for name, layer in layers.items()
    }
    bias, rows = config.penalize_bias, dict.fromkeys(layers, COMPARED_ROWS)
    activations = Activations(streamed.model, layers, trace.contexts, folded, inputs, rows, config.seed)
    return activations.reads({name: f.W if bias else f.W[:, : f.layer.inputs] for name, f in folded.items()}, earlier)


def _without(trace: ForwardTrace, earlier: ForwardTrace) -> ForwardTrace:
    """A trace without what has been found in earlier segments, which run what precedes the blocks as well."""
    known = {*earlier.contexts, *earlier.unusable}
    contexts = {name: context for name, context in trace.contexts.items() if name not in known}
    previous = next(reversed(earlier.contexts), None)
    return ForwardTrace(
        contexts,
        {name: reason for name, reason in trace.unusable.items() if name not in known},
        [name for name in trace.direct_products if name not in earlier.direct_products],
        {
            name: layer if layer in contexts else previous
            for name, layer in trace.batchnorms.items()
            if name not in earlier.batchnorms
        },
        {name: count for name, count in trace.rows.items() if name in contexts},
    )


def _joined(first: ForwardTrace, second: ForwardTrace) -> ForwardTrace:
    """The trace of two consecutive segments."""
    return ForwardTrace(
        first.contexts | second.contexts,
        first.unusable | second.unusable,
        sorted([*first.direct_products, *second.direct_products]),
        first.batchnorms | second.batchnorms,
        first.rows | second.rows,
    )


def _part(plan: Plan, trace: ForwardTrace) -> Plan:
    """The part of a plan that is in one segment."""
    return replace(
        plan,
        layers={name: plan.layers[name] for name in trace.contexts},
        contexts=trace.contexts,
        budgets={name: plan.budgets[name] for name in trace.contexts},
        shared=tuple(name for name in plan.shared if name in trace.contexts),
        batchnorms=trace.batchnorms,
        rows=trace.rows,
    )
