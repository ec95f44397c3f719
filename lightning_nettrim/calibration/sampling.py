"""Uniform samples of bounded size: of the rows of a stream, and of the inputs in one pass over a data loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.batch import CalibrationBatch, Forward, call, inputs_are_independent
from lightning_nettrim.calibration.nested import Structure, common_length, count_inputs, flatten
from lightning_nettrim.calibration.output_cache import OutputCache
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_nettrim.runtime.offload import StoredTensors, TensorStore

_TENSOR = object()  # placeholder for a tensor among the leaves of a batch


class Reservoir:
    """A uniform sample of at most ``size`` rows of a stream, in the order of the stream.

    Every row draws a uniform random key, and the rows with the ``size`` smallest keys are kept (bottom-k sampling), so
    that a smaller sample is a subset of a larger one. The sample depends on the seed and the numbers of rows alone.

    Args:
        size: maximum number of rows.
        seed: seed of the keys.
        store: where the rows are kept; if ``None``, on their own device.

    Attributes:
        seen: number of rows of the stream so far.
    """

    def __init__(self, size: int, seed: int, store: TensorStore | None = None) -> None:
        self.size, self.seen = size, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._threshold = float("inf")
        self._store = TensorStore("device") if store is None else store
        self._keys: list[Tensor] = []
        self._chunks: list[StoredTensors] = []
        self._labels: list[Any] = []

    def pick(self, count: int, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Select from the next rows of the stream.

        Args:
            count: number of rows.
            whole: let all of them share one key, so that they are kept or dropped together; the sample may then exceed
                its size.

        Returns:
            ``(n,)`` indices of the selected rows and ``(n,)`` their keys; pass both to `keep`. Selected rows may be
            dropped later.
        """
        keys = torch.rand(1 if whole else count, generator=self._generator, dtype=torch.float64).expand(count)
        self.seen += count
        selected = (keys < self._threshold).nonzero().squeeze(1)
        if len(selected) > self.size:
            selected = (keys <= keys.kthvalue(self.size).values).nonzero().squeeze(1)
        return selected, keys[selected]

    def keep(self, keys: Tensor, tensors: Sequence[Tensor], label: Any = None) -> None:
        """Add selected rows to the sample, as one chunk.

        Args:
            keys: ``(n,)`` their keys.
            tensors: the rows, in any number of tensors of length n.
            label: label of the chunk.
        """
        if not len(keys):
            return
        self._keys.append(keys)
        self._chunks.append(self._store.put(tensors))
        self._labels.append(label)
        if sum(map(len, self._keys)) > 2 * self.size:
            self._shrink()

    def offer(self, tensors: Sequence[Tensor], label: Any = None) -> None:
        """Select from the next rows of the stream, in several tensors of one length, and add the selected ones."""
        selected, keys = self.pick(len(tensors[0]))
        self.keep(keys, [t.index_select(0, selected.to(t.device)) for t in tensors], label)

    def chunks(self) -> list[StoredTensors]:
        """The sample in chunks, without those of which no rows are left."""
        if sum(map(len, self._keys)) > self.size:
            self._shrink()
        return self._chunks

    @property
    def labels(self) -> list[Any]:
        """Labels of the chunks, in order."""
        return self._labels

    def _shrink(self) -> None:
        """Drop all rows but those with the ``size`` smallest keys."""
        self._threshold = float(torch.cat(self._keys).kthvalue(self.size).values)
        kept = [(keys <= self._threshold).nonzero().squeeze(1) for keys in self._keys]
        pairs = [(i, keep) for i, keep in enumerate(kept) if len(keep)]
        for i, keep in pairs:
            if len(keep) < len(self._keys[i]):
                rows = [t.index_select(0, keep.to(t.device)) for t in self._chunks[i].load()]
                self._chunks[i] = self._store.put(rows)
        self._chunks = [self._chunks[i] for i, _ in pairs]
        self._keys = [self._keys[i][keep] for i, keep in pairs]
        self._labels = [self._labels[i] for i, _ in pairs]


@dataclass(frozen=True, eq=False)
class _Template:
    """A batch without its tensors.

    Attributes:
        leaves: the leaves, with ``_TENSOR`` in place of tensors.
        structure: the structure.
        divisible: whether the batch can be split and concatenated with others.
        tensors: the tensors of a batch that is not divisible.
    """

    leaves: list[Any]
    structure: Structure
    divisible: bool
    tensors: StoredTensors | None = None

    def matches(self, other: _Template) -> bool:
        """Whether batches of both templates can be concatenated."""
        return self.divisible and other.divisible and self.structure == other.structure and self._same_leaves(other)

    def _same_leaves(self, other: _Template) -> bool:
        try:
            return all(a is b or bool(a == b) for a, b in zip(self.leaves, other.leaves, strict=True))
        except Exception:  # raised by objects that cannot be compared
            return False


@dataclass(frozen=True, eq=False)
class StoredBatch:
    """A nested value, such as a batch, whose tensors are in a store; ``rows`` selects some rows, ``None`` is all."""

    tensors: StoredTensors
    template: _Template
    rows: slice | None = None

    @classmethod
    def of(cls, value: Any, store: TensorStore, divisible: bool) -> StoredBatch:
        """Store a nested value.

        Args:
            value: any nested tensors.
            store: where the tensors are kept.
            divisible: whether the first dimension of all its tensors is that of the inputs.
        """
        leaves, structure = flatten(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(store.put(tensors), _Template(leaves, structure, divisible))

    def load(self) -> Any:
        """The batch."""
        tensors = self.tensors.load()
        parts = iter(tensors if self.rows is None else [t[self.rows] for t in tensors])
        leaves = [next(parts) if leaf is _TENSOR else leaf for leaf in self.template.leaves]
        return self.template.structure.build(iter(leaves))

    def halves(self) -> list[StoredBatch]:
        """Two batches with half of the rows each, or this one if it cannot be split."""
        tensors = self.tensors.load() if self.template.divisible else []
        start, stop, _ = (self.rows or slice(None)).indices(min(map(len, tensors), default=0))
        middle = (start + stop + 1) // 2
        if stop - start < 2:
            return [self]
        return [replace(self, rows=slice(start, middle)), replace(self, rows=slice(middle, stop))]


@dataclass(frozen=True, eq=False)
class _StoredPair:
    """A batch and a value that belongs to it, which are split together."""

    batch: StoredBatch | _StoredPair
    value: StoredBatch | None

    def load(self) -> tuple[Any, Any]:
        """The batch and the value."""
        return self.batch.load(), None if self.value is None else self.value.load()

    def halves(self) -> list[_StoredPair]:
        """Two pairs with half of the rows each, or this one if one of both cannot be split."""
        batches: Sequence[StoredBatch | _StoredPair] = self.batch.halves()
        values: Sequence[StoredBatch | None] = [None, None] if self.value is None else self.value.halves()
        split = len(batches) == len(values) == 2
        return [_StoredPair(batch, value) for batch, value in zip(batches, values, strict=True)] if split else [self]


class CalibrationSet(Sequence[CalibrationBatch]):
    """The calibration set: a sequence of batches, each of which is loaded from its store when it is accessed.

    Args:
        batches: the stored batches.
        inputs: number of inputs in all batches.
        forward: function that runs a batch through a model.
        processes: processes that run every forward pass together, for which they must have equally many batches: those
            of a process with fewer are split, and if that is not possible, the last ones of the others are dropped.
        cache: outputs of layers that are kept between forward passes; ``None`` keeps none.
    """

    def __init__(
        self,
        batches: Sequence[StoredBatch | _StoredPair],
        inputs: int,
        forward: Forward = call,
        processes: ProcessGroup = SINGLE_PROCESS,
        cache: OutputCache | None = None,
    ) -> None:
        self._forward, self._processes, self.inputs, self.cache = forward, processes, inputs, cache
        self._batches = _equally_many(list(batches), processes)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> CalibrationBatch: ...

    @overload
    def __getitem__(self, index: slice) -> CalibrationSet: ...

    def __getitem__(self, index: int | slice) -> CalibrationBatch | CalibrationSet:
        """One batch, loaded, or a calibration set of several batches, not loaded."""
        if isinstance(index, slice):
            batches = self._batches[index]
            inputs = max(1, self.inputs * len(batches) // max(len(self), 1))
            return CalibrationSet(batches, inputs, self._forward, self._processes, self.cache)
        stored = self._batches[index]
        reuse = nullcontext if self.cache is None else partial(self.cache.reused, stored)
        return CalibrationBatch(stored.load(), self._forward, seed=index, reuse=reuse)

    def first(self, inputs: int) -> CalibrationSet:
        """The calibration set of the first batches, with about the given number of inputs."""
        return self[: min(self._processes.gather(max(1, len(self) * inputs // self.inputs)))]

    def with_smaller_batches(self) -> CalibrationSet:
        """The same inputs in batches of half the size, where batches can be split."""
        halves: list[StoredBatch | _StoredPair] = [half for batch in self._batches for half in batch.halves()]
        return CalibrationSet(halves, self.inputs, self._forward, self._processes, self.cache)

    def with_cache(self, cache: OutputCache) -> CalibrationSet:
        """The same batches, run with a cache of the outputs of layers."""
        return CalibrationSet(self._batches, self.inputs, self._forward, self._processes, cache)

    def run_together(self, processes: ProcessGroup) -> CalibrationSet:
        """The same inputs in as many batches as in the other processes, which run every forward pass with this one."""
        return CalibrationSet(self._batches, self.inputs, self._forward, processes, self.cache)

    def paired(self, values: Sequence[StoredBatch] | None, forward: Forward) -> CalibrationSet:
        """A calibration set of pairs ``(batch, value)``.

        Args:
            values: one for each batch; ``None`` is the value ``None`` for all.
            forward: function that runs a pair through a model.
        """
        all_values: Sequence[StoredBatch | None] = [None] * len(self) if values is None else values
        pairs = [_StoredPair(*pair) for pair in zip(self._batches, all_values, strict=True)]
        return CalibrationSet(pairs, self.inputs, forward)

    def divided(self, batches: int) -> CalibrationSet:
        """The same inputs in at least so many batches, or in as many as possible."""
        divided = self
        while len(divided) < batches:
            smaller = divided.with_smaller_batches()
            if len(smaller) == len(divided):
                break
            divided = smaller
        return divided


def _equally_many(batches: list[StoredBatch | _StoredPair], processes: ProcessGroup) -> list[StoredBatch | _StoredPair]:
    """The batches, some of them split or dropped so that all processes have equally many."""
    if processes.count == 1:
        return batches
    most = max(processes.gather(len(batches)))
    while len(batches) < most:
        parts: list[StoredBatch | _StoredPair] = []
        for i, batch in enumerate(batches):
            parts += batch.halves() if len(parts) + len(batches) - i < most else [batch]
        if len(parts) == len(batches):
            break
        batches = parts
    return batches[: min(processes.gather(len(batches)))]


def sample_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    num_samples: int,
    seed: int,
    store: TensorStore | None = None,
    forward: Forward = call,
    independent: bool | None = None,
) -> CalibrationSet:
    """Draw a uniform sample of at most ``num_samples`` inputs in one pass over ``batches``.

    There is only one pass, so that generators, shuffling and random augmentation are allowed. A batch is split if
    `inputs_are_independent`; otherwise it is kept or dropped as a whole, and the sample may exceed ``num_samples``.

    Args:
        model: the model that takes the inputs.
        batches: the batches to sample from.
        num_samples: maximum number of inputs.
        seed: seed of the sample.
        store: where the inputs are kept; if ``None``, in the memory of the host.
        forward: function that runs a batch through the model.
        independent: whether the inputs of a batch are processed independently; ``None`` determines it by forward
            passes, for each structure of batches.

    Raises:
        ValueError: if the batches contain no inputs.
    """
    store = store or TensorStore()
    reservoir, width = Reservoir(num_samples, seed, store), 1
    divisible: dict[Structure, bool] = {}
    for batch in batches:
        leaves, structure = flatten(batch)
        length = common_length(batch)
        if length == 0:
            continue
        if independent is not None:
            divisible[structure] = independent
        elif length is not None and length > 1 and structure not in divisible:
            divisible[structure] = inputs_are_independent(model, CalibrationBatch(batch, forward), length)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if length is not None and divisible.get(structure):
            width = max(width, length)
            reservoir.offer(tensors, _Template(leaves, structure, True))
        else:
            selected, keys = reservoir.pick(count_inputs(batch), whole=True)
            if len(selected):
                reservoir.keep(keys, [], _Template(leaves, structure, False, store.put(tensors)))
    if not reservoir.seen:
        raise ValueError("expected batches to calibrate on, got none: the loader is empty, or a generator is exhausted")
    chunks = reservoir.chunks()
    inputs = reservoir.size if reservoir.seen > reservoir.size else reservoir.seen
    return CalibrationSet(
        [_concatenated(group, store) for group in _groups(chunks, reservoir.labels, width)], inputs, forward
    )


def _groups(
    chunks: list[StoredTensors], templates: list[_Template], width: int
) -> Iterator[list[tuple[list[Tensor], _Template]]]:
    """Groups of consecutive chunks that form one batch of at most ``width`` rows.

    The lists are emptied in the process, so that no input is in memory twice.
    """
    group: list[tuple[list[Tensor], _Template]] = []
    while chunks:
        tensors, template = chunks.pop(0).load(), templates.pop(0)
        if group and not _can_be_concatenated([*group, (tensors, template)], width):
            yield group
            group = []
        group.append((tensors, template))
    yield group


def _can_be_concatenated(group: Sequence[tuple[list[Tensor], _Template]], width: int) -> bool:
    """Whether the last chunk matches the one before, and all together have at most ``width`` rows."""
    *_, (previous, previous_template), (tensors, template) = group
    matching = previous_template.matches(template) and _row_types(previous) == _row_types(tensors)
    return matching and sum(len(tensors[0]) for tensors, _ in group) <= width


def _row_types(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Shape and dtype of a row of each tensor."""
    return [(t.shape[1:], t.dtype) for t in tensors]


def _concatenated(group: Sequence[tuple[list[Tensor], _Template]], store: TensorStore) -> StoredBatch:
    """The batch of a group of chunks, or the only batch of a group that is not divisible."""
    parts, templates = zip(*group, strict=True)
    if templates[0].tensors is not None:
        return StoredBatch(templates[0].tensors, templates[0])
    return StoredBatch(store.put([torch.cat(tensors) for tensors in zip(*parts, strict=True)]), templates[0])
