"""Sparsity patterns: which weights are kept or pruned together, and among which others they are ranked."""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern(ABC):
    """A pattern of the zeros in a layer's ``(N, M)`` matrix: equal blocks of weights, some kept in each set of blocks.

    A subclass defines `block`, the shape of a block, and `num_sets`, the number of sets in which blocks are ranked.
    Blocks are numbered output by output; consecutive blocks belong to the same set.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name, for reports."""

    @abstractmethod
    def block(self, N: int, M: int) -> tuple[int, int]:
        """Number of outputs and of consecutive inputs of a block, in a layer of N inputs and M outputs."""

    @abstractmethod
    def num_sets(self, N: int, M: int) -> int:
        """Number of sets in which blocks are ranked."""

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros that the pattern itself determines; ``None`` if it is free."""
        return None

    @property
    def allows_bias(self) -> bool:
        """Whether the bias can be pruned like a weight, as an additional input."""
        return False

    @property
    def selects_units(self) -> bool:
        """Whether whole units of the network are chosen, instead of the weights of each layer on its own."""
        return False

    def span(self, N: int) -> int:
        """Number of consecutive inputs whose weights must be chosen at the same time."""
        return N

    def check(self, N: int, M: int) -> None:
        """Check that a layer can be divided into the pattern's blocks and sets.

        Raises:
            ValueError: if it cannot.
        """
        rows, columns = self.block(N, M)
        for what, size, unit in (("inputs", N, columns), ("outputs", M, rows)):
            if size % unit:
                raise ValueError(self._indivisible(unit, what, size))

    def _indivisible(self, unit: int, what: str, size: int) -> str:
        return (
            f"pattern {self.name!r}: expected a multiple of {unit} {what}, got {size}: choose another pattern for this"
            " layer, or ignore it"
        )

    def to_blocks(self, W: Tensor) -> Tensor:
        """``(*batch, N, M)`` as ``(*batch, sets, blocks per set, weights per block)``."""
        N, M = W.shape[-2:]
        r, c = self.block(N, M)
        blocks = W.mT.reshape(*W.shape[:-2], M // r, r, N // c, c).transpose(-3, -2)
        return blocks.reshape(*W.shape[:-2], self.num_sets(N, M), -1, r * c)

    def from_blocks(self, blocks: Tensor, N: int, M: int) -> Tensor:
        """Inverse of `to_blocks`."""
        r, c = self.block(N, M)
        matrix = blocks.reshape(*blocks.shape[:-3], M // r, N // c, r, c).transpose(-3, -2)
        return matrix.reshape(*blocks.shape[:-3], M, N).mT

    def kept_blocks(self, sparsity: float, N: int, M: int) -> int:
        """Number of blocks kept in each set at a sparsity, rounded to the nearest."""
        r, c = self.block(N, M)
        size = N * M // (r * c * self.num_sets(N, M))
        return size - round(sparsity * size)

    def nonzeros(self, sparsity: float, N: int, M: int) -> int:
        """Number of weights kept in the layer at a sparsity."""
        r, c = self.block(N, M)
        return self.kept_blocks(sparsity, N, M) * self.num_sets(N, M) * r * c

    def keep_largest(self, score: Tensor, kept: int) -> Tensor:
        """``(*batch, N, M)`` bool: in each set exactly the ``kept`` blocks with the largest sum of scores."""
        sums = self.to_blocks(score).sum(-1)
        chosen = torch.zeros_like(sums, dtype=torch.bool).scatter_(
            -1, sums.topk(kept, dim=-1, sorted=False).indices, True
        )
        N, M = score.shape[-2:]
        r, c = self.block(N, M)
        return self.from_blocks(chosen.unsqueeze(-1).expand(*chosen.shape, r * c), N, M)

    def to_config(self) -> str | dict[str, Any]:
        """What `parse_pattern` reads back: a name or, for patterns of other packages, a class path with arguments."""
        if type(self).__module__ == __name__:
            return self.name
        kind = type(self)
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": asdict(self)}

    def __str__(self) -> str:
        """The name."""
        return self.name


class _SingleWeights(Pattern):
    """Blocks of one weight whose inputs are independent, so that the bias is one more input."""

    @property
    def allows_bias(self) -> bool:
        """The bias is one more weight."""
        return True

    def block(self, N: int, M: int) -> tuple[int, int]:
        """One weight."""
        return 1, 1

    def span(self, N: int) -> int:
        """Inputs are independent."""
        return 1


@dataclass(frozen=True)
class Unstructured(_SingleWeights):
    """Single weights, ranked in the whole layer; ``"unstructured"``."""

    @property
    def name(self) -> str:
        """``unstructured``."""
        return "unstructured"

    def num_sets(self, N: int, M: int) -> int:
        """One: the layer."""
        return 1

    def to_blocks(self, W: Tensor) -> Tensor:
        """``(*batch, 1, N·M, 1)``, without reordering."""
        N, M = W.shape[-2:]
        return W.reshape(*W.shape[:-2], 1, N * M, 1)

    def from_blocks(self, blocks: Tensor, N: int, M: int) -> Tensor:
        """Inverse of `to_blocks`."""
        return blocks.reshape(*blocks.shape[:-3], N, M)


@dataclass(frozen=True)
class PerNeuron(_SingleWeights):
    """Single weights, the same number in each output; ``"per_neuron"``."""

    @property
    def name(self) -> str:
        """``per_neuron``."""
        return "per_neuron"

    def num_sets(self, N: int, M: int) -> int:
        """One for each output."""
        return M


@dataclass(frozen=True)
class NOfM(Pattern):
    """``n`` of every ``m`` consecutive inputs of an output; ``"n:m"``, as ``"2:4"``.

    Args:
        n: weights kept.
        m: of so many.

    Raises:
        ValueError: unless 0 < n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.n < self.m:
            raise ValueError(f"pattern: expected n:m with 0 < n < m, got '{self.n}:{self.m}'")

    @property
    def name(self) -> str:
        """``n:m``."""
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """1 − n/m."""
        return 1 - self.n / self.m

    def block(self, N: int, M: int) -> tuple[int, int]:
        """One weight."""
        return 1, 1

    def num_sets(self, N: int, M: int) -> int:
        """One for every m weights."""
        return N * M // self.m

    def span(self, N: int) -> int:
        """The m inputs are ranked together."""
        return self.m

    def check(self, N: int, M: int) -> None:
        """Check that the number of inputs is a multiple of m."""
        if N % self.m:
            raise ValueError(self._indivisible(self.m, "inputs", N))

    def kept_blocks(self, sparsity: float, N: int, M: int) -> int:
        """n, at every sparsity."""
        return self.n


@dataclass(frozen=True)
class Neuron(Pattern):
    """All weights of an output except its free bias; ``"neuron"``."""

    @property
    def name(self) -> str:
        """``neuron``."""
        return "neuron"

    def block(self, N: int, M: int) -> tuple[int, int]:
        """All inputs of an output."""
        return 1, N

    def num_sets(self, N: int, M: int) -> int:
        """One: the layer."""
        return 1


@dataclass(frozen=True)
class Units(Pattern):
    """Whole units: inputs that no output of a layer reads, together with what computes them; ``"units"``."""

    @property
    def name(self) -> str:
        """``units``."""
        return "units"

    @property
    def selects_units(self) -> bool:
        """Units are chosen for all layers that read them together."""
        return True

    def block(self, N: int, M: int) -> tuple[int, int]:
        """All outputs of an input."""
        return M, 1

    def num_sets(self, N: int, M: int) -> int:
        """One: the layer."""
        return 1


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of ``outputs`` by ``inputs`` as they lie in a layer's ``weight``; ``"rxc"``, as ``"4x4"``.

    Args:
        outputs: rows of a block in ``weight``.
        inputs: columns of a block in ``weight``.
    """

    outputs: int
    inputs: int

    @property
    def name(self) -> str:
        """``rxc``."""
        return f"{self.outputs}x{self.inputs}"

    def block(self, N: int, M: int) -> tuple[int, int]:
        """Outputs by inputs."""
        return self.outputs, self.inputs

    def num_sets(self, N: int, M: int) -> int:
        """One: the layer."""
        return 1


_NAMED: dict[str, type[Pattern]] = {
    "unstructured": Unstructured,
    "per_neuron": PerNeuron,
    "neuron": Neuron,
    "units": Units,
}
_NUMBERS = re.compile(r"([1-9]\d*)([:x])([1-9]\d*)")


def parse_pattern(pattern: str | Pattern | Mapping[str, Any]) -> Pattern:
    """A pattern from its name, from a class path with arguments, or itself.

    Args:
        pattern: ``unstructured``, ``per_neuron``, ``neuron``, ``n:m`` as ``2:4``, ``rxc`` as ``4x4``; or
            ``{"class_path": ..., "init_args": {...}}``; or a `Pattern`.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, Mapping):
        return _from_class_path(pattern)
    if pattern in _NAMED:
        return _NAMED[pattern]()
    found = _NUMBERS.fullmatch(pattern) if isinstance(pattern, str) else None
    if found is None or (found[2] == ":" and int(found[1]) >= int(found[3])):
        raise ValueError(
            "pattern: expected 'unstructured', 'per_neuron', 'neuron', n of m as '2:4' or outputs by inputs as '4x4',"
            f" got {pattern!r}"
        )
    numbers = int(found[1]), int(found[3])
    return NOfM(*numbers) if found[2] == ":" else Blocks(*numbers)


def _from_class_path(config: Mapping[str, Any]) -> Pattern:
    try:
        module, _, name = str(config["class_path"]).rpartition(".")
        pattern = getattr(importlib.import_module(module), name)(**config.get("init_args", {}))
    except (KeyError, ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"pattern: expected the class path of a Pattern, got {dict(config)}: {error}") from error
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern: expected the class path of a Pattern, got {config['class_path']!r}")
    return pattern
