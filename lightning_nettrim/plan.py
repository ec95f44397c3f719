"""Plan: which layers are pruned, how far, in which order, and what is left alone; and the arguments that say so."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_nettrim.capture import watch
from lightning_nettrim.flow import Flow
from lightning_nettrim.layers import LEFT_OUT, Layer, joined, matrices, per_layer_options, prunable
from lightning_nettrim.pattern import Pattern
from lightning_nettrim.ranks import ALONE, Ranks
from lightning_nettrim.replay import Replay, evaluating
from lightning_nettrim.report import SkippedLayer
from lightning_nettrim.shelf import OFFLOAD
from lightning_nettrim.solvers import Solver

MIN_SAMPLES = 32
"""Fewer samples than this determine no layer worth the name."""


Options = Mapping[str, Mapping[str, float | bool | str]]


@dataclass(frozen=True)
class Budget:
    """How far one layer is to be pruned, and in which pattern: exactly one of ``epsilon`` and ``sparsity`` is set.

    A pattern ``n:m`` is its own sparsity. The bounds hold where an allocation chooses the sparsity.
    """

    epsilon: float | None = None
    sparsity: float | None = None
    refit: bool = True
    pattern: str = "unstructured"
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for numbers out of their ranges and for a pattern that contradicts them."""
        fixed = Pattern(self.pattern).sparsity
        if fixed is not None and self.epsilon is None and self.sparsity is None:
            object.__setattr__(self, "sparsity", fixed)
        if (self.epsilon is None) == (self.sparsity is None):
            both = f"epsilon={self.epsilon} and sparsity={self.sparsity}"
            raise ValueError(f"expected one of epsilon and sparsity for a layer, got {both}: set one of them")
        if self.epsilon is not None and not 0 < self.epsilon < float("inf"):
            raise ValueError(f"epsilon: expected > 0 (0.05 is 5 % of a layer's response), got {self.epsilon}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: expected a fraction of zeros in [0, 1), got {self.sparsity}")
        if fixed is not None and self.sparsity not in (0, fixed):
            given = f"epsilon={self.epsilon}" if self.sparsity is None else f"sparsity={self.sparsity}"
            raise ValueError(f"pattern {self.pattern!r}: expected no budget but its own {fixed:g}, got {given}")
        if not 0 <= self.min_sparsity <= self.max_sparsity <= 1:
            raise ValueError(
                "min_sparsity, max_sparsity: expected 0 ≤ min ≤ max ≤ 1, got"
                f" {self.min_sparsity} and {self.max_sparsity}"
            )


@dataclass(frozen=True, eq=False)
class Plan:
    """What `trim` is going to do: the layers in order of execution, each with its use and budget, and the rest.

    ``shared`` are the layers without a budget of their own, over which an allocation spreads the common one. ``norms``
    are the BatchNorms in order of execution, each with the pruned layer that ran last before it. ``rows`` are all
    positions of each layer on the calibration set of this process.
    """

    layers: dict[str, Layer]
    flows: dict[str, Flow]
    budgets: dict[str, Budget]
    skipped: tuple[SkippedLayer, ...]
    shared: tuple[str, ...]
    norms: dict[str, str | None]
    rows: dict[str, int]


def override(common: Budget, options: Mapping[str, float | bool | str]) -> Budget:
    """The common budget with a layer's own options in its place.

    Raises:
        ValueError: for options that are none, and for values outside their ranges.
    """
    known = {field.name for field in fields(Budget)}
    if unknown := set(options) - known:
        raise ValueError(f"per_layer: expected the options {', '.join(sorted(known))}, got {sorted(unknown)}")
    merged: dict[str, Any] = {name: getattr(common, name) for name in known} | dict(options)
    if _own(options):
        merged |= {"epsilon": options.get("epsilon"), "sparsity": options.get("sparsity")}
    return Budget(**merged)


def _own(options: Mapping[str, float | bool | str]) -> bool:
    """Whether a layer's options decide how far it is pruned."""
    pattern = Pattern(str(options.get("pattern", "unstructured")))
    return bool({"epsilon", "sparsity"} & set(options)) or pattern.sparsity is not None


def check_arguments(
    *,
    epsilon: float | None,
    sparsity: float | None,
    max_drop: float | None,
    mode: str,
    pattern: str,
    allocate: str,
    importance: str,
    scheme: str,
    solver: Solver | None,
    refit: bool,
    per_layer: Options | None,
    num_samples: int,
    max_rows: int | None,
    penalize_bias: bool,
    plan: str | Path | None,
    max_memory: float | None,
    offload: str,
    on_failure: str,
) -> Budget:
    """What can be said about the arguments of `trim` before a model is seen; returns the common budget.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    amounts: dict[str, Any] = {
        "epsilon": epsilon, "sparsity": sparsity, "max_drop": max_drop, "num_samples": num_samples,
        "max_rows": max_rows, "max_memory": max_memory,
    }  # fmt: skip
    for name, amount in amounts.items():
        if isinstance(amount, str):
            raise ValueError(f"{name}: expected a number, got {amount!r}: leave out the quotes")
    if plan is not None and not epsilon == sparsity == max_drop is None:
        raise ValueError(
            f"plan: expected no epsilon, sparsity or max_drop beside it, got {epsilon}, {sparsity} and {max_drop}:"
            " edit the plan"
        )
    given = {"epsilon": epsilon, "sparsity": sparsity, "max_drop": max_drop, "plan": plan}
    if all(value is None for value in given.values()) and Pattern(pattern).sparsity is None:
        raise ValueError(
            "expected one of sparsity, epsilon, max_drop, plan and an n:m pattern, got none: sparsity=0.8 makes four of"
            " five weights zero"
        )
    if epsilon is not None and sparsity is not None:
        raise ValueError(f"expected one of sparsity and epsilon, got sparsity={sparsity} and epsilon={epsilon}: choose")
    if plan is not None:
        common = Budget(None, 0.0, refit)
    elif max_drop is None:
        common = Budget(epsilon, sparsity, refit, pattern)
    elif epsilon is not None or sparsity is not None or Pattern(pattern).sparsity is not None:
        raise ValueError(
            f"max_drop: expected no epsilon, sparsity or n:m pattern beside it, got epsilon={epsilon},"
            f" sparsity={sparsity} and pattern={pattern!r}: it finds the sparsity itself"
        )
    else:
        common = Budget(None, 0.0, refit, pattern)
    if max_drop is not None and not 0 <= max_drop < float("inf"):
        raise ValueError(f"max_drop: expected ≥ 0 (0.005 is half a point of accuracy), got {max_drop}")
    for name, value, choices in (
        ("scheme", scheme, ("cascade", "parallel")),
        ("mode", mode, ("max", "min")),
        ("allocate", allocate, ("uniform", "epsilon", "global", "magnitude")),
        ("importance", importance, ("outgoing", "equal")),
        ("offload", offload, OFFLOAD),
        ("on_failure", on_failure, ("magnitude", "dense")),
    ):
        if value not in choices:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")
    if solver is not None and not isinstance(solver, Solver):
        raise ValueError(f"solver: expected a Solver, such as Cardinality(), got {solver!r}")
    if max_memory is not None and not 0 < max_memory < float("inf"):
        raise ValueError(f"max_memory: expected > 0 (GiB; 2 is two of them), got {max_memory}")
    if num_samples < MIN_SAMPLES:
        raise ValueError(f"num_samples: expected at least {MIN_SAMPLES}, got {num_samples}: a few thousand are usual")
    if max_rows is not None and max_rows < MIN_SAMPLES:
        raise ValueError(f"max_rows: expected at least {MIN_SAMPLES}, got {max_rows}: a few thousand are usual")
    budgets = [common, *(override(common, options) for options in (per_layer or {}).values())]
    for budget in budgets:
        if budget.epsilon is not None and budget.pattern != "unstructured" and (solver is None or solver.convex):
            raise ValueError(
                f"pattern {budget.pattern!r}: expected a sparsity, got epsilon={budget.epsilon}: the convex"
                " program knows no pattern; give a sparsity, or the solver Cardinality"
            )
        if penalize_bias and budget.pattern not in ("unstructured", "per_neuron"):
            raise ValueError(
                f"penalize_bias: expected a pattern of single weights, got {budget.pattern!r}: biases are in no block"
            )
    return common


def budgets_of(layers: Mapping[str, Layer], common: Budget, per_layer: Options | None) -> dict[str, Budget]:
    """The budget of each layer.

    Raises:
        ValueError: for a key that matches nothing and for a layer that its pattern does not divide.
    """
    budgets = {name: override(common, own) for name, own in per_layer_options(per_layer, layers).items()}
    for name, layer in layers.items():
        try:
            Pattern(budgets[name].pattern).check(layer.inputs, layer.groups * layer.outputs)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return budgets


def choose(
    model: nn.Module,
    replays: Sequence[Replay],
    common: Budget,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    per_layer: Options | None = None,
    ranks: Ranks = ALONE,
) -> Plan:
    """Choose the layers and see, on the held batches, in which order they run and what follows them.

    Raises:
        ValueError: for a layer, a batch or a key that cannot be used, and for a layer that some of several processes
            use otherwise.
    """
    layers, skipped = prunable(model, targets, ignore)
    budgets = budgets_of(layers, common, per_layer)
    own = per_layer_options(per_layer, layers)
    with ranks.together(), evaluating(model):
        course = watch(model, layers, replays)
    ranks.agree(course.described())
    flows, unusable = course.flows, course.unusable
    skipped |= unusable
    skipped |= {
        name: "never called in the forward pass" for name in layers if name not in flows and name not in unusable
    }
    skipped |= _direct(model, course.direct, {*layers, *skipped})
    if not flows:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"expected a layer that the forward pass reaches, got none ({reasons})")
    return Plan(
        {name: layers[name] for name in flows},
        flows,
        {name: budgets[name] for name in flows},
        tuple(SkippedLayer(name, reason, _weights(model, name, course.direct)) for name, reason in skipped.items()),
        tuple(name for name in flows if not _own(own[name]) and Pattern(budgets[name].pattern).sparsity is None),
        course.norms,
        course.rows,
    )


def _direct(model: nn.Module, names: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """The reason for each module, by name, that multiplies by parameters of its own and is no known layer."""
    reasons = {}
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        within = any(f"{path}.".startswith(f"{layer}.") for layer in known if layer)
        if not within and not isinstance(module, nn.MultiheadAttention):
            kind = type(module).__name__
            reasons[path] = f"{kind} multiplies by its own parameter {key}, which no layer can be made of"
    return reasons


def _weights(model: nn.Module, name: str, direct: Collection[str]) -> int:
    """Values in the matrices of a module that is left alone.

    0 for embeddings, whose rows are looked up, and where it is not known: parts of a module, as projections are.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return 0
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 0
    own = {key: p for key, p in module.named_parameters(recurse=False) if joined(name, key) in direct}
    return sum(p.numel() for p in (own | matrices(module)).values() if not is_lazy(p))


def coverage(todo: Plan) -> str:
    """A warning where less than half of the values in weight matrices belong to layers that can be pruned, else empty.

    Layers that were left out on purpose do not count.
    """
    own = sum(layer.parameter.numel() for layer in todo.layers.values())
    others = [layer for layer in todo.skipped if layer.weights and layer.reason not in LEFT_OUT]
    total = own + sum(layer.weights for layer in others)
    if 2 * own >= total:
        return ""
    largest = sorted(others, key=lambda layer: -layer.weights)[:3]
    reasons = "; ".join(f"{layer.name or '(the model)'}: {layer.reason}" for layer in largest)
    return f"only {own / total:.0%} of the values in weight matrices are in layers that can be pruned ({reasons})"


def as_text(todo: Plan, budgets: Mapping[str, Budget]) -> str:
    """The budgets of all layers as YAML, which `read` reads back after it was edited."""
    layers = {
        name: {key: value for key in ("epsilon", "sparsity") if (value := getattr(budgets[name], key)) is not None}
        | {"pattern": budgets[name].pattern, "refit": budgets[name].refit}
        | {"shape": list(layer.parameter.shape), "follows": str(todo.flows[name])}
        for name, layer in todo.layers.items()
    }
    skipped = {layer.name: layer.reason for layer in todo.skipped}
    return yaml.safe_dump({"layers": layers, "skipped": skipped}, sort_keys=False)


def read(path: str | Path, layers: Mapping[str, Layer]) -> dict[str, dict[str, Any]]:
    """The options of each layer in a plan's file, for `per_layer`; layers that it does not name are left alone.

    Raises:
        ValueError: for a file that holds no plan, a layer that is not there and one of another shape.
    """
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["layers"]
        options = {str(name): dict(row) for name, row in rows.items()}
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"plan: expected a plan.yaml as a dry run writes it, got {path}: {error!r}") from error
    for name, row in options.items():
        row.pop("follows", None)
        shape = row.pop("shape", None)
        if name not in layers:
            raise ValueError(f"plan: expected layers of this model, got {name!r}: it has {', '.join(layers)}")
        own = list(layers[name].parameter.shape)
        if shape is not None and shape != own:
            raise ValueError(f"plan: {name}: expected shape {own}, got {shape}: of another model?")
    return options
