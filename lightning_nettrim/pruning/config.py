"""Every option of pruning: defined, documented and validated here, mirrored by `trim` and `NetTrim`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lightning_nettrim.core.pattern import Pattern, parse_pattern
from lightning_nettrim.pruning.allocation.base import Allocation
from lightning_nettrim.pruning.budget import Budget, Options, override
from lightning_nettrim.pruning.recovery import Recovery
from lightning_nettrim.pruning.units.base import UnitSelection
from lightning_nettrim.runtime.offload import OFFLOAD_TARGETS
from lightning_nettrim.solvers import ADMM, Cardinality, Solver

MIN_SAMPLES = 32
"""Minimum of ``num_samples`` and ``max_rows``."""

DEFAULT_ROWS = 8192
"""Rows per layer if ``max_rows`` is not given and there are not more samples."""

UNIT_LIMITS = ("macs", "parameters", "latency")
"""Budgets of the pattern ``units``: fractions that are left of the trained network's."""

ALLOCATIONS = ("uniform", "epsilon", "global", "magnitude")
"""Names of allocations."""

CHOICES: dict[str, tuple[str, ...]] = {
    "scheme": ("cascade", "parallel"),
    "mode": ("max", "min"),
    "importance": ("outgoing", "equal"),
    "offload": OFFLOAD_TARGETS,
    "on_failure": ("magnitude", "dense"),
}
"""Values of the options that are one of several strings."""


@dataclass(frozen=True)
class PruningConfig:
    """The options of pruning.

    Args:
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

    Raises:
        ValueError: naming the option, what was expected and what was given.
    """

    epsilon: float | None = None
    sparsity: float | None = None
    macs: float | None = None
    parameters: float | None = None
    latency: float | None = None
    max_drop: float | None = None
    mode: Literal["max", "min"] = "max"
    relative: bool = False
    pattern: str | Pattern = "unstructured"
    select: UnitSelection | None = None
    round_to: int = 1
    latency_batch_size: int = 1
    allocate: Literal["uniform", "epsilon", "global", "magnitude"] | Allocation = "global"
    importance: Literal["outgoing", "equal"] = "outgoing"
    scheme: Literal["cascade", "parallel"] = "cascade"
    solver: Solver | None = None
    refit: bool = True
    recover: Recovery | None = None
    targets: Sequence[str] | None = None
    ignore: Sequence[str] | None = None
    per_layer: Options | None = None
    num_samples: int = 8192
    max_rows: int | None = None
    seed: int = 0
    penalize_bias: bool = False
    recalibrate_batchnorm: bool = True
    max_memory: float | None = None
    offload: Literal["device", "cpu", "disk"] = "cpu"
    on_failure: Literal["magnitude", "dense"] = "magnitude"
    plan: str | Path | None = None

    def __post_init__(self) -> None:
        """Check every option."""
        self._check_types()
        self._check_budget()
        self._check_choices()
        self._check_ranges()
        self._check_combinations()

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> PruningConfig:
        """The options among the arguments of a function that mirrors them."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @property
    def budget(self) -> Budget:
        """The common budget of all layers; of sparsity 0 where a search or a plan determines it."""
        if self.plan is not None:
            return Budget(None, 0.0, self.refit)
        pattern = parse_pattern(self.pattern)
        if self.max_drop is not None or pattern.selects_units:
            return Budget(None, 0.0, self.refit, pattern)
        return Budget(self.epsilon, self.sparsity, self.refit, pattern)

    @property
    def unit_budget(self) -> tuple[str, float] | None:
        """What the pattern ``units`` leaves at most: a measure of the cost and the fraction of it.

        ``None`` if the selection determines the numbers of units.
        """
        for name in UNIT_LIMITS:
            if (value := getattr(self, name)) is not None:
                return name, value
        return None if self.sparsity is None else ("units", 1 - self.sparsity)

    @property
    def _sets_sizes(self) -> bool:
        """Whether the selection of units determines how many are kept."""
        return self.select is not None and self.select.sets_sizes

    @property
    def rows_limit(self) -> int:
        """Maximum number of rows of a layer: ``max_rows``, else ``num_samples`` but at least DEFAULT_ROWS."""
        return max(self.num_samples, DEFAULT_ROWS) if self.max_rows is None else self.max_rows

    def solver_for(self, epsilon: float | None) -> Solver:
        """The solver for a budget: the given one; else `Cardinality` or, at an epsilon, `ADMM`."""
        return self.solver or (Cardinality() if epsilon is None else ADMM())

    def _check_types(self) -> None:
        budgets = ("epsilon", "sparsity", *UNIT_LIMITS, "max_drop")
        for name in (*budgets, "round_to", "latency_batch_size", "num_samples", "max_rows", "max_memory"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name}: expected a number, got {value!r}: leave out the quotes")

    def _check_budget(self) -> None:
        """Exactly one budget, or a plan, is given."""
        own = parse_pattern(self.pattern).sparsity
        if self.plan is not None and not self.epsilon == self.sparsity == self.max_drop is None:
            raise ValueError(
                f"plan: expected no epsilon, sparsity or max_drop beside it, got {self.epsilon}, {self.sparsity} and"
                f" {self.max_drop}: edit the plan"
            )
        limits = [getattr(self, name) for name in UNIT_LIMITS]
        given = (self.epsilon, self.sparsity, *limits, self.max_drop, self.plan, own)
        if all(value is None for value in given) and not self._sets_sizes:
            raise ValueError(
                "expected one of sparsity, epsilon, max_drop, plan and an n:m pattern, or macs, parameters or latency"
                " with the pattern 'units', got none: sparsity=0.8 makes four of five weights zero"
            )
        if self.epsilon is not None and self.sparsity is not None:
            raise ValueError(
                f"expected one of sparsity and epsilon, got sparsity={self.sparsity} and epsilon={self.epsilon}: choose"
            )
        if self.max_drop is not None and (self.epsilon is not None or self.sparsity is not None or own is not None):
            raise ValueError(
                f"max_drop: expected no epsilon, sparsity or n:m pattern beside it, got epsilon={self.epsilon},"
                f" sparsity={self.sparsity} and pattern={self.pattern!r}: it finds the sparsity itself"
            )
        if self.max_drop is not None and not 0 <= self.max_drop < float("inf"):
            raise ValueError(f"max_drop: expected ≥ 0 (0.005 is half a point of accuracy), got {self.max_drop}")
        for name in UNIT_LIMITS:
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected the fraction that is left, in (0, 1], got {value}")

    def _check_choices(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")
        if not isinstance(self.allocate, Allocation) and self.allocate not in ALLOCATIONS:
            names = " or ".join(map(repr, ALLOCATIONS))
            raise ValueError(f"allocate: expected {names} or an Allocation, got {self.allocate!r}")
        if self.recover is not None and not isinstance(self.recover, Recovery):
            raise ValueError(f"recover: expected a Recovery, such as Distillation(), got {self.recover!r}")
        if self.select is not None and not isinstance(self.select, UnitSelection):
            raise ValueError(f"select: expected a UnitSelection, such as Coreset(), got {self.select!r}")
        if self.solver is not None and not isinstance(self.solver, Solver):
            raise ValueError(f"solver: expected a Solver, such as Cardinality(), got {self.solver!r}")

    def _check_ranges(self) -> None:
        if self.max_memory is not None and not 0 < self.max_memory < float("inf"):
            raise ValueError(f"max_memory: expected > 0 (in GiB), got {self.max_memory}")
        if self.round_to < 1:
            raise ValueError(f"round_to: expected at least 1, got {self.round_to}: 8 suits most hardware")
        if self.latency_batch_size < 1:
            raise ValueError(f"latency_batch_size: expected at least 1, got {self.latency_batch_size}")
        for name in ("num_samples", "max_rows"):
            if (value := getattr(self, name)) is not None and value < MIN_SAMPLES:
                raise ValueError(f"{name}: expected at least {MIN_SAMPLES}, got {value}: a few thousand are usual")

    def _check_units(self) -> None:
        """The pattern ``units`` has a budget that it takes, and no option of single layers."""
        limits = {name: getattr(self, name) for name in UNIT_LIMITS if getattr(self, name) is not None}
        if not parse_pattern(self.pattern).selects_units:
            own_options = {"select": None, "round_to": 1, "latency_batch_size": 1}
            changed = {k: getattr(self, k) for k, default in own_options.items() if getattr(self, k) != default}
            for name, value in (limits | changed).items():
                raise ValueError(f"{name}: expected the pattern 'units', got {name}={value}: it counts whole units")
            own = (override(Budget(sparsity=0.0), options).pattern for options in (self.per_layer or {}).values())
            if any(pattern.selects_units for pattern in own):
                raise ValueError(
                    "per_layer: expected other patterns than 'units', which is chosen for all layers together: give it"
                    " as pattern="
                )
            return
        given = limits | {
            name: getattr(self, name) for name in ("sparsity", "epsilon", "max_drop") if getattr(self, name) is not None
        }
        if self._sets_sizes and given:
            got = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"select: expected no budget beside {self.select}, which sets the numbers, got {got}")
        if len(given) > 1 or self.epsilon is not None:
            expected = "one of sparsity, macs, parameters, latency and max_drop"
            got = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"pattern 'units': expected {expected}, got {got}: choose one")
        Budget(sparsity=self.sparsity or 0.0)  # raises outside its range; `budget` leaves it to the selection of units
        if self.allocate != "global":
            raise ValueError(
                f"allocate: expected 'global' with the pattern 'units', got {self.allocate!r}: units are removed where"
                " that changes the network's output least"
            )
        for name in ("solver", "per_layer"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}: expected none with the pattern 'units', got {value!r}: leave it out")
        if self.select is not None and self.select.uses_synthetic_inputs and self.scheme != "parallel":
            raise ValueError(
                f"scheme: expected 'parallel' with {self.select}, got {self.scheme!r}: synthetic inputs are for the"
                " trained network"
            )

    def _check_combinations(self) -> None:
        """The solver takes the budgets of all layers, and their patterns are possible."""
        self._check_units()
        common = self.budget
        for budget in (common, *(override(common, options) for options in (self.per_layer or {}).values())):
            convex = self.solver_for(budget.epsilon).takes_epsilon
            unstructured = parse_pattern("unstructured")
            if budget.epsilon is not None and budget.pattern != unstructured and convex:
                raise ValueError(
                    f"pattern {budget.pattern.name!r}: expected a sparsity, got epsilon={budget.epsilon}: the convex"
                    " program has no pattern; give a sparsity, or the solver Cardinality"
                )
            if self.penalize_bias and not budget.pattern.allows_bias:
                raise ValueError(
                    f"penalize_bias: expected a pattern of single weights, got {budget.pattern.name!r}: biases are in"
                    " no block"
                )
