"""The plan: which layers are pruned, in which order, how far, and which are left dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.tracing import ForwardTrace, trace_forward
from lightning_nettrim.layers import EXCLUDED_BY_USER, Layer, find_layers, joined, match_options, matrices
from lightning_nettrim.layers.context import LayerContext
from lightning_nettrim.pruning.budget import Budget, Options, override, sets_budget
from lightning_nettrim.pruning.results import SkippedLayer
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup


@dataclass(frozen=True)
class LayerSelection:
    """Which layers are pruned, and their own options.

    Attributes:
        common: the budget of layers without options of their own.
        targets: keys of the layers to prune; ``None`` is all.
        ignore: keys of the layers to leave dense.
        per_layer: options by key.
    """

    common: Budget
    targets: Sequence[str] | None = None
    ignore: Sequence[str] | None = None
    per_layer: Options | None = None

    def find(self, model: nn.Module) -> tuple[dict[str, Layer], dict[str, Budget], dict[str, str]]:
        """The layers by name, their budgets, and the reasons for the layers that are left dense.

        Raises:
            ValueError: for keys that match nothing and for a layer that its pattern does not divide.
        """
        layers, skipped = find_layers(model, self.targets, self.ignore)
        budgets = {name: override(self.common, own) for name, own in match_options(self.per_layer, layers).items()}
        for name, layer in layers.items():
            try:
                budgets[name].pattern.check(layer.inputs, layer.groups * layer.outputs)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return layers, budgets, skipped


@dataclass(frozen=True, eq=False)
class Plan:
    """What is pruned and how far.

    Attributes:
        layers: in order of execution.
        contexts: what follows each of them.
        budgets: of each of them.
        skipped: layers that are left dense.
        shared: names of the layers without a budget of their own, over which an allocation distributes the common one.
        batchnorms: the BatchNorms in order of execution, each with the pruned layer that is executed last before it.
        rows: number of rows of each layer in the calibration set of this process.
    """

    layers: dict[str, Layer]
    contexts: dict[str, LayerContext]
    budgets: dict[str, Budget]
    skipped: tuple[SkippedLayer, ...]
    shared: tuple[str, ...]
    batchnorms: dict[str, str | None]
    rows: dict[str, int]


def make_plan(
    model: nn.Module,
    batches: Sequence[CalibrationBatch],
    selection: LayerSelection,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Plan:
    """Select the layers and trace, on the calibration set, in which order they are executed and what follows them.

    Raises:
        ValueError: for a layer, a batch or a key that cannot be used, and for a layer that is used differently in
            different processes.
    """
    layers, budgets, skipped = selection.find(model)
    with processes.raise_together(), evaluation_mode(model):
        trace = trace_forward(model, layers, batches)
    advice = "the forward pass depends on its activations; ignore this layer, or shuffle the batches"
    processes.check_agreement(trace.described(), advice)
    return plan_of_trace(model, selection, (layers, budgets, skipped), trace)


def plan_of_trace(
    model: nn.Module,
    selection: LayerSelection,
    found: tuple[dict[str, Layer], dict[str, Budget], dict[str, str]],
    trace: ForwardTrace,
) -> Plan:
    """The plan for the layers that a selection has found, of which a forward pass has been traced.

    Raises:
        ValueError: if the forward pass calls none of them.
    """
    layers, budgets, skipped = found
    options = match_options(selection.per_layer, layers)
    skipped = skipped | trace.unusable
    unreached = [name for name in layers if name not in trace.contexts and name not in trace.unusable]
    skipped |= dict.fromkeys(unreached, "never called in the forward pass")
    skipped |= _direct_products(model, trace.direct_products, {*layers, *skipped})
    if not trace.contexts:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"expected a layer that the forward pass calls, got none ({reasons}): change targets or ignore"
        )
    reached = list(trace.contexts)
    shared = [name for name in reached if not sets_budget(options[name]) and budgets[name].pattern.sparsity is None]
    left_dense = (
        SkippedLayer(name, reason, _count_weights(model, name, trace.direct_products))
        for name, reason in skipped.items()
    )
    return Plan(
        layers={name: layers[name] for name in reached},
        contexts=trace.contexts,
        budgets={name: budgets[name] for name in reached},
        skipped=tuple(left_dense),
        shared=tuple(shared),
        batchnorms=trace.batchnorms,
        rows=trace.rows,
    )


def _direct_products(model: nn.Module, parameters: Sequence[str], known: set[str]) -> dict[str, str]:
    """The reason for each module that multiplies by parameters of its own and is not a known layer."""
    reasons = {}
    for parameter in parameters:
        path, _, key = parameter.rpartition(".")
        module = model.get_submodule(path)
        within = any(f"{path}.".startswith(f"{layer}.") for layer in known if layer)
        if not within and not isinstance(module, nn.MultiheadAttention):
            kind = type(module).__name__
            reasons[path] = f"{kind} multiplies by its own parameter {key}, for which there is no layer type"
    return reasons


def _count_weights(model: nn.Module, name: str, direct_products: Sequence[str]) -> int:
    """Number of values in the matrices of a module that is left dense.

    0 for embeddings, which are looked up, and for parts of a module such as projections, where it is unknown.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return 0
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 0
    own = {key: p for key, p in module.named_parameters(recurse=False) if joined(name, key) in direct_products}
    return sum(p.numel() for p in (own | matrices(module)).values() if not is_lazy(p))


def coverage_warning(plan: Plan) -> str:
    """A warning if less than half of the values in weight matrices belong to layers that can be pruned, else empty.

    Layers that the user has excluded do not count.
    """
    own = sum(layer.parameter.numel() for layer in plan.layers.values())
    others = [layer for layer in plan.skipped if layer.weights and layer.reason not in EXCLUDED_BY_USER]
    total = own + sum(layer.weights for layer in others)
    if 2 * own >= total:
        return ""
    largest = sorted(others, key=lambda layer: -layer.weights)[:3]
    reasons = "; ".join(f"{layer.name or '(the model)'}: {layer.reason}" for layer in largest)
    return f"only {own / total:.0%} of the values in weight matrices are in layers that can be pruned ({reasons})"


def zero_budgets(plan: Plan) -> Mapping[str, Budget]:
    """Budgets at which every layer stays dense."""
    return {name: Budget(None, 0.0, budget.refit, budget.pattern) for name, budget in plan.budgets.items()}
