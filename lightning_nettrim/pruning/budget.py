"""The budget of one layer: how far it is pruned, and in which pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_nettrim.core.pattern import Pattern, Unstructured, parse_pattern

Options = Mapping[str, Mapping[str, float | bool | str | Pattern]]
"""Options of layers that replace the common ones, by key."""


@dataclass(frozen=True)
class Budget:
    """How far one layer is pruned. Exactly one of ``epsilon`` and ``sparsity`` is set.

    Args:
        epsilon: maximum change of the response, relative to its norm.
        sparsity: fraction of zeros, in [0, 1); a pattern ``n:m`` sets it itself.
        refit: whether the weights are refitted on their support.
        pattern: of the zeros; names are parsed.
        min_sparsity: lower bound for an allocation.
        max_sparsity: upper bound for an allocation.
        removed_inputs: inputs of the layer that it does not read; its other weights are dense.
        input_scales: factors of the weights of all inputs, by which they are multiplied in place of a solve; if there
            are none, the weights are solved for.
        synthetic_inputs: ``{module: maximum norm}`` of modules whose inputs are random while the layer is
            recorded.

    Raises:
        ValueError: for numbers outside their ranges and for a pattern that contradicts them.
    """

    epsilon: float | None = None
    sparsity: float | None = None
    refit: bool = True
    pattern: Pattern = Unstructured()
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0
    removed_inputs: tuple[int, ...] = ()
    input_scales: tuple[float, ...] = ()
    synthetic_inputs: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Parse the pattern and check the numbers."""
        object.__setattr__(self, "pattern", parse_pattern(self.pattern))
        object.__setattr__(self, "removed_inputs", tuple(self.removed_inputs))
        object.__setattr__(self, "input_scales", tuple(self.input_scales))
        fixed = self.pattern.sparsity
        if fixed is not None and self.epsilon is None and self.sparsity is None:
            object.__setattr__(self, "sparsity", fixed)
        if (self.epsilon is None) == (self.sparsity is None):
            both = f"epsilon={self.epsilon} and sparsity={self.sparsity}"
            raise ValueError(f"epsilon, sparsity: expected one of them for a layer, got {both}: set one of them")
        if self.epsilon is not None and not 0 < self.epsilon < float("inf"):
            raise ValueError(f"epsilon: expected > 0 (0.05 is 5 % of a layer's response), got {self.epsilon}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: expected a fraction of zeros in [0, 1), got {self.sparsity}")
        if fixed is not None and self.sparsity not in (0, fixed):
            given = f"epsilon={self.epsilon}" if self.sparsity is None else f"sparsity={self.sparsity}"
            raise ValueError(
                f"pattern {self.pattern.name!r}: expected no other budget than its own sparsity {fixed:g}, got {given}"
            )
        if not 0 <= self.min_sparsity <= self.max_sparsity <= 1:
            raise ValueError(
                "min_sparsity, max_sparsity: expected 0 ≤ min ≤ max ≤ 1, got"
                f" {self.min_sparsity} and {self.max_sparsity}"
            )


def override(common: Budget, options: Mapping[str, Any]) -> Budget:
    """The common budget with the options of a layer in its place.

    Raises:
        ValueError: for unknown options and for values outside their ranges.
    """
    known = {field.name for field in fields(Budget)}
    if unknown := set(options) - known:
        raise ValueError(f"per_layer: expected the options {', '.join(sorted(known))}, got {sorted(unknown)}")
    merged: dict[str, Any] = {name: getattr(common, name) for name in known} | dict(options)
    if sets_budget(options):
        merged |= {"epsilon": options.get("epsilon"), "sparsity": options.get("sparsity")}
    return Budget(**merged)


def sets_budget(options: Mapping[str, Any]) -> bool:
    """Whether the options of a layer determine how far it is pruned."""
    pattern = parse_pattern(options.get("pattern", "unstructured"))
    return bool({"epsilon", "sparsity"} & set(options)) or pattern.sparsity is not None
