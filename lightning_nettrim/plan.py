"""Plan: which layers are pruned, how far, in which order, and what is left alone; and the arguments that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_nettrim.capture import Flow, evaluating, watch
from lightning_nettrim.layers import per_layer_options, prunable
from lightning_nettrim.report import SkippedLayer
from lightning_nettrim.sample import Inputs

MIN_SAMPLES = 32
"""Fewer samples than this determine no layer worth the name."""


@dataclass(frozen=True)
class Budget:
    """How far one layer is to be pruned: exactly one of both is set."""

    epsilon: float | None = None
    sparsity: float | None = None
    refit: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError unless exactly one of ``epsilon`` > 0 and ``sparsity`` in [0, 1) is given."""
        if (self.epsilon is None) == (self.sparsity is None):
            both = f"epsilon={self.epsilon} and sparsity={self.sparsity}"
            raise ValueError(f"expected exactly one of epsilon and sparsity, got {both}: set one of them")
        if self.epsilon is not None and not 0 < self.epsilon < float("inf"):
            raise ValueError(f"epsilon: expected > 0 (0.05 is 5 % of a layer's response), got {self.epsilon}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: expected a fraction of zeros in [0, 1), got {self.sparsity}")


@dataclass(frozen=True, eq=False)
class Plan:
    """What `trim` is going to do: the layers in order of execution, each with its use and budget, and the rest."""

    layers: dict[str, nn.Linear]
    flows: dict[str, Flow]
    budgets: dict[str, Budget]
    skipped: tuple[SkippedLayer, ...]


def override(common: Budget, options: Mapping[str, float | bool]) -> Budget:
    """The common budget with a layer's own options in its place.

    Raises:
        ValueError: for options other than epsilon, sparsity and refit, and for values outside their ranges.
    """
    if unknown := set(options) - {"epsilon", "sparsity", "refit"}:
        raise ValueError(f"per_layer: expected the options epsilon, sparsity and refit, got {sorted(unknown)}")
    own_budget = {"epsilon", "sparsity"} & set(options)
    return Budget(
        options.get("epsilon") if own_budget else common.epsilon,
        options.get("sparsity") if own_budget else common.sparsity,
        bool(options.get("refit", common.refit)),
    )


def check_arguments(
    epsilon: float | None,
    sparsity: float | None,
    scheme: str,
    num_samples: int,
    per_layer: Mapping[str, Mapping[str, float | bool]] | None,
    refit: bool = True,
) -> Budget:
    """What can be said about the arguments before a model is seen; returns the common budget.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    common = Budget(epsilon, sparsity, refit)
    if scheme not in ("cascade", "parallel"):
        raise ValueError(f"scheme: expected 'cascade' or 'parallel', got {scheme!r}")
    if num_samples < MIN_SAMPLES:
        raise ValueError(f"num_samples: expected at least {MIN_SAMPLES}, got {num_samples}: a few thousand are usual")
    for options in (per_layer or {}).values():
        override(common, options)
    return common


def plan(
    model: nn.Module,
    batches: Sequence[Inputs],
    common: Budget,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    per_layer: Mapping[str, Mapping[str, float | bool]] | None = None,
) -> Plan:
    """Choose the layers and see, on one held batch, in which order they run and what follows them.

    Raises:
        ValueError: for a layer, a batch or a key that cannot be used.
    """
    layers, skipped = prunable(model, targets, ignore)
    options = per_layer_options(per_layer, layers)
    with evaluating(model):
        flows = watch(model, layers, batches[0])
    skipped |= {name: "never called in the forward pass" for name in layers if name not in flows}
    if not flows:
        raise ValueError(f"expected a layer that the forward pass reaches, got none of {', '.join(layers)}")
    return Plan(
        {name: layers[name] for name in flows},
        flows,
        {name: override(common, options[name]) for name in flows},
        tuple(SkippedLayer(name, reason) for name, reason in skipped.items()),
    )
