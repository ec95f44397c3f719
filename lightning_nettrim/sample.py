"""Sample: a bounded, uniform, replayable sample of the inputs of one pass over a loader, and of any stream of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from lightning_nettrim.replay import Forward, Replay, call, independent
from lightning_nettrim.shelf import Kept, Shelf
from lightning_nettrim.structure import Structure, common_length, count_inputs, flatten

_ROWS = object()  # stands, among the leaves of a batch, where a tensor goes


class Reservoir:
    """A uniform sample of at most ``size`` rows of a stream, in the stream's order; the same for the same row counts.

    Every row draws a uniform key; the ``size`` smallest keys stay (bottom-k sampling), so that a smaller sample is part
    of a larger one.

    Args:
        size: rows at most.
        seed: of the keys.
        shelf: where rows wait; where they come from, if not given.
    """

    def __init__(self, size: int, seed: int, shelf: Shelf | None = None) -> None:
        self.size, self.seen = size, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._threshold = float("inf")
        self._shelf = Shelf("device") if shelf is None else shelf
        self._keys: list[Tensor] = []
        self._chunks: list[Kept] = []
        self._labels: list[Any] = []

    def pick(self, count: int, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Show so many rows; returns which of them stay, for now, and their keys, for `keep`.

        Rows that are to stay or go as a ``whole`` share one key; the sample may then exceed its size by them.
        """
        keys = torch.rand(1 if whole else count, generator=self._generator, dtype=torch.float64).expand(count)
        self.seen += count
        chosen = (keys < self._threshold).nonzero().squeeze(1)
        if len(chosen) > self.size:
            chosen = (keys <= keys.kthvalue(self.size).values).nonzero().squeeze(1)
        return chosen, keys[chosen]

    def keep(self, keys: Tensor, tensors: Sequence[Tensor], label: Any = None) -> None:
        """The rows that were picked, in several tensors of one length, and what the chunk of them is known by."""
        if not len(keys):
            return
        self._keys.append(keys)
        self._chunks.append(self._shelf.put(tensors))
        self._labels.append(label)
        if sum(map(len, self._keys)) > 2 * self.size:
            self._shrink()

    def offer(self, tensors: Sequence[Tensor], label: Any = None) -> None:
        """Show rows that lie in several tensors of one length."""
        chosen, keys = self.pick(len(tensors[0]))
        self.keep(keys, [t.index_select(0, chosen.to(t.device)) for t in tensors], label)

    def chunks(self) -> list[Kept]:
        """The sample, one entry for each offer of which rows are left."""
        if sum(map(len, self._keys)) > self.size:
            self._shrink()
        return self._chunks

    @property
    def labels(self) -> list[Any]:
        """Of the chunks, in order."""
        return self._labels

    def _shrink(self) -> None:
        self._threshold = float(torch.cat(self._keys).kthvalue(self.size).values)
        kept = [(keys <= self._threshold).nonzero().squeeze(1) for keys in self._keys]
        pairs = [(i, keep) for i, keep in enumerate(kept) if len(keep)]
        for i, keep in pairs:
            if len(keep) < len(self._keys[i]):
                rows = [t.index_select(0, keep.to(t.device)) for t in self._chunks[i].load()]
                self._chunks[i] = self._shelf.put(rows)
        self._chunks = [self._chunks[i] for i, _ in pairs]
        self._keys = [self._keys[i][keep] for i, keep in pairs]
        self._labels = [self._labels[i] for i, _ in pairs]


@dataclass(frozen=True, eq=False)
class _Form:
    """What a batch is but for its rows: its leaves that are no tensors, its structure, whether it can be divided."""

    leaves: list[Any]
    structure: Structure
    divisible: bool
    whole: Kept | None = None  # the tensors of a batch that cannot be divided

    def joins(self, other: _Form) -> bool:
        """Whether rows of both can be in one batch."""
        return self.divisible and other.divisible and self.structure == other.structure and self._same_leaves(other)

    def _same_leaves(self, other: _Form) -> bool:
        try:
            return all(one is two or bool(one == two) for one, two in zip(self.leaves, other.leaves, strict=True))
        except Exception:  # of objects that do not compare
            return False


@dataclass(frozen=True, eq=False)
class _Batch:
    """Tensors on a shelf, the form of the batch that they belong to, and which of their rows."""

    kept: Kept
    form: _Form
    rows: slice | None = None

    def load(self) -> Any:
        tensors = self.kept.load()
        parts = iter(tensors if self.rows is None else [t[self.rows] for t in tensors])
        leaves = [next(parts) if leaf is _ROWS else leaf for leaf in self.form.leaves]
        return self.form.structure.build(iter(leaves))

    def halves(self) -> list[_Batch]:
        """Two batches of half the rows, or this one."""
        tensors = self.kept.load() if self.form.divisible else []
        start, stop, _ = (self.rows or slice(None)).indices(min(map(len, tensors), default=0))
        middle = (start + stop + 1) // 2
        if stop - start < 2:
            return [self]
        return [replace(self, rows=slice(start, middle)), replace(self, rows=slice(middle, stop))]


class Held(Sequence[Replay]):
    """The calibration set: batches that are loaded one at a time from wherever they wait, to be replayed.

    Args:
        batches: on their shelf.
        inputs: in all batches together.
        forward: runs a batch through a model.
    """

    def __init__(self, batches: Sequence[_Batch], inputs: int, forward: Forward = call) -> None:
        self._batches, self._forward, self.inputs = list(batches), forward, inputs

    def __len__(self) -> int:
        """Batches."""
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Replay: ...

    @overload
    def __getitem__(self, index: slice) -> Held: ...

    def __getitem__(self, index: int | slice) -> Replay | Held:
        """One batch, or the first ones, still on their shelf."""
        if isinstance(index, slice):
            batches = self._batches[index]
            return Held(batches, max(1, self.inputs * len(batches) // max(len(self), 1)), self._forward)
        return Replay(self._batches[index].load(), self._forward, seed=index)

    def first(self, inputs: int) -> Held:
        """The first batches, with about so many inputs."""
        return self[: max(1, len(self) * inputs // self.inputs)]

    def narrower(self) -> Held:
        """The same inputs in batches of half the rows, where they can be divided."""
        halves = [half for batch in self._batches for half in batch.halves()]
        return Held(halves, self.inputs, self._forward)


def hold(
    model: nn.Module,
    batches: Iterable[Any],
    num_samples: int,
    seed: int,
    shelf: Shelf | None = None,
    forward: Forward = call,
) -> Held:
    """A uniform sample of at most ``num_samples`` inputs of one pass over ``batches``, kept on a shelf.

    The pass happens once, so that generators, shuffling and augmentation are safe; what is returned can be replayed.
    A batch is divided where its inputs are `independent`; else it is kept or dropped whole, and the last one of them
    may exceed ``num_samples``.

    Args:
        model: whose inputs.
        batches: to sample from.
        num_samples: inputs at most.
        seed: of the sample.
        shelf: where they wait; the host's memory, if not given.
        forward: runs a batch through the model.

    Raises:
        ValueError: for batches that hold no input.
    """
    shelf = shelf or Shelf()
    reservoir, width = Reservoir(num_samples, seed, shelf), 1
    divisible: dict[Structure, bool] = {}
    for batch in batches:
        leaves, structure = flatten(batch)
        length = common_length(batch)
        if length == 0:
            continue
        if length is not None and length > 1 and structure not in divisible:
            divisible[structure] = independent(model, Replay(batch, forward), length)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        leaves = [_ROWS if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if length is not None and divisible.get(structure):
            width = max(width, length)
            reservoir.offer(tensors, _Form(leaves, structure, True))
        else:
            chosen, keys = reservoir.pick(count_inputs(batch), whole=True)
            if len(chosen):
                reservoir.keep(keys, [], _Form(leaves, structure, False, shelf.put(tensors)))
    if not reservoir.seen:
        raise ValueError("expected batches to calibrate on, got none: the loader is empty, or a generator is exhausted")
    chunks = reservoir.chunks()
    inputs = reservoir.size if reservoir.seen > reservoir.size else reservoir.seen
    return Held([_joined(group, shelf) for group in _groups(chunks, reservoir.labels, width)], inputs, forward)


def _groups(chunks: list[Kept], forms: list[_Form], width: int) -> Iterator[list[tuple[list[Tensor], _Form]]]:
    """Neighboring chunks of one form, up to ``width`` rows together, so that a replay has few batches.

    The lists are emptied on the way, so that no input is held twice.
    """
    group: list[tuple[list[Tensor], _Form]] = []
    while chunks:
        tensors, form = chunks.pop(0).load(), forms.pop(0)
        if group and not _joinable([*group, (tensors, form)], width):
            yield group
            group = []
        group.append((tensors, form))
    yield group


def _joinable(group: Sequence[tuple[list[Tensor], _Form]], width: int) -> bool:
    """Whether the last chunk has the form of the others, and all rows fit a batch."""
    *_, (before, form), (tensors, last) = group
    alike = form.joins(last) and _kinds(before) == _kinds(tensors)
    return alike and sum(len(tensors[0]) for tensors, _ in group) <= width


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.shape[1:], t.dtype) for t in tensors]


def _joined(group: Sequence[tuple[list[Tensor], _Form]], shelf: Shelf) -> _Batch:
    parts, forms = zip(*group, strict=True)
    if forms[0].whole is not None:
        return _Batch(forms[0].whole, forms[0])
    return _Batch(shelf.put([torch.cat(tensors) for tensors in zip(*parts, strict=True)]), forms[0])
