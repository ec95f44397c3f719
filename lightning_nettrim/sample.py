"""Sample: a bounded, uniform, replayable sample of the inputs of one pass over a loader, and of any stream of rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_nettrim.shelf import Kept, Shelf

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_ROWS = object()  # stands, in the form of a batch, where a tensor's sampled rows go


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

    def pick(self, count: int) -> tuple[Tensor, Tensor]:
        """Show so many rows; returns which of them stay, for now, and their keys, for `keep`."""
        keys = torch.rand(count, generator=self._generator, dtype=torch.float64)
        self.seen += count
        chosen = (keys < self._threshold).nonzero().squeeze(1)
        if len(chosen) > self.size:
            chosen = (keys <= keys.kthvalue(self.size).values).nonzero().squeeze(1)
        return chosen, keys[chosen]

    def keep(self, keys: Tensor, tensors: Sequence[Tensor]) -> None:
        """The rows that were picked, in several tensors of one length."""
        if not len(keys):
            return
        self._keys.append(keys)
        self._chunks.append(self._shelf.put(tensors))
        if sum(map(len, self._keys)) > 2 * self.size:
            self._shrink()

    def offer(self, tensors: Sequence[Tensor]) -> bool:
        """Show rows that lie in several tensors of one length; returns whether any of them stays, for now."""
        chosen, keys = self.pick(len(tensors[0]))
        self.keep(keys, [t.index_select(0, chosen.to(t.device)) for t in tensors])
        return len(chosen) > 0

    def chunks(self) -> list[Kept]:
        """The sample, one entry for each offer of which rows are left."""
        if sum(map(len, self._keys)) > self.size:
            self._shrink()
        return self._chunks

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


def inputs_of(model: nn.Module, batch: Any) -> Inputs:
    """The arguments of ``model.forward`` in a batch.

    A tuple or list gives its first element, (input, target, …). A mapping gives the entries that ``forward`` names, or
    is passed whole if it names none of them. Anything else is the one input itself.
    """
    if isinstance(batch, list | tuple) and len(batch):
        batch = batch[0]
    if isinstance(batch, Mapping):
        names = inspect.signature(model.forward).parameters
        if chosen := {key: value for key, value in batch.items() if key in names}:
            return (), chosen
    return (batch,), {}


@dataclass(frozen=True, eq=False)
class _Batch:
    """One held batch: its tensors on a shelf, the form that they take, and which of their rows."""

    kept: Kept
    leaves: list[Any]
    tree: Any
    rows: slice | None = None

    def load(self) -> Inputs:
        tensors = self.kept.load()
        parts = iter(tensors if self.rows is None else [t[self.rows] for t in tensors])
        return tree_unflatten([next(parts) if leaf is _ROWS else leaf for leaf in self.leaves], self.tree)


class Held(Sequence[Inputs]):
    """Held batches, loaded one at a time from wherever they wait."""

    def __init__(self, batches: Sequence[_Batch]) -> None:
        self._batches = list(batches)

    def __len__(self) -> int:
        """Batches."""
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Inputs: ...

    @overload
    def __getitem__(self, index: slice) -> Held: ...

    def __getitem__(self, index: int | slice) -> Inputs | Held:
        """One batch, or some of them still on their shelf."""
        return Held(self._batches[index]) if isinstance(index, slice) else self._batches[index].load()

    def narrower(self) -> Held:
        """The same inputs in batches of half the rows, where they can be divided."""
        halves = []
        for batch in self._batches:
            lengths = {len(t) for t in batch.kept.load()} if _ROWS in batch.leaves else set()
            start, stop, _ = (batch.rows or slice(None)).indices(max(lengths, default=0))
            middle = (start + stop + 1) // 2
            parts = [slice(start, middle), slice(middle, stop)] if stop - start > 1 else [batch.rows]
            halves += [replace(batch, rows=rows) for rows in parts]
        return Held(halves)


def hold(model: nn.Module, batches: Iterable[Any], num_samples: int, seed: int, shelf: Shelf | None = None) -> Held:
    """A uniform sample of at most ``num_samples`` inputs of one pass over ``batches``, kept on a shelf.

    The pass happens once, so that generators, shuffling and augmentation are safe; what is returned can be replayed.
    A batch whose tensors do not share a first dimension counts as one input and is kept or dropped whole.

    Args:
        model: whose inputs.
        batches: to sample from.
        num_samples: inputs at most.
        seed: of the sample.
        shelf: where they wait; the host's memory, if not given.

    Raises:
        ValueError: for batches that hold no input.
    """
    shelf = shelf or Shelf()
    reservoir, width = Reservoir(num_samples, seed, shelf), 1
    forms: dict[int, tuple[list[Any], Any]] = {}  # of each batch: its leaves and its tree
    for index, batch in enumerate(batches):
        leaves, tree = tree_flatten(inputs_of(model, batch))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        lengths = {len(t) if t.dim() else -1 for t in tensors}
        if lengths == {0}:
            continue
        if len(lengths) == 1 and -1 not in lengths:
            (length,) = lengths
            width = max(width, length)
            leaves = [_ROWS if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        else:
            length, tensors, leaves = 1, [], [tree_map(_to("cpu"), leaf) for leaf in leaves]
        if reservoir.offer([torch.full((length,), index), *tensors]):
            forms[index] = leaves, tree
    if not reservoir.seen:
        raise ValueError("expected batches to calibrate on, got none: the loader is empty, or a generator is exhausted")
    return Held([_joined(group, shelf) for group in _groups(reservoir.chunks(), forms, width)])


def _groups(
    chunks: list[Kept], forms: Mapping[int, tuple[list[Any], Any]], width: int
) -> Iterator[list[tuple[list[Tensor], list[Any], Any]]]:
    """Neighbouring chunks of one form, up to ``width`` rows together, so that a replay has few batches.

    The list is emptied on the way, so that no input is held twice.
    """
    group: list[tuple[list[Tensor], list[Any], Any]] = []
    while chunks:
        number, *tensors = chunks.pop(0).load()
        leaves, tree = forms[int(number[0])]
        if group and not (group[-1][2] == tree and _joinable([*group, (tensors, leaves, tree)], width)):
            yield group
            group = []
        group.append((tensors, leaves, tree))
    yield group


def _joinable(group: Sequence[tuple[list[Tensor], list[Any], Any]], width: int) -> bool:
    """Whether chunks hold nothing but tensors of one form whose rows fit a batch."""
    if any(leaf is not _ROWS for _, leaves, _ in group for leaf in leaves):
        return False
    forms = {tuple((t.shape[1:], t.dtype) for t in tensors) for tensors, _, _ in group}
    return len(forms) == 1 and sum(len(tensors[0]) for tensors, _, _ in group) <= width


def _joined(group: Sequence[tuple[list[Tensor], list[Any], Any]], shelf: Shelf) -> _Batch:
    parts, leaves, tree = zip(*group, strict=True)
    return _Batch(shelf.put([torch.cat(tensors) for tensors in zip(*parts, strict=True)]), leaves[0], tree[0])


def _to(device: torch.device | str) -> Callable[[Any], Any]:
    return lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model on held inputs, on the device of its parameters, with autocast off."""
    device = next(model.parameters()).device
    args, kwargs = tree_map(_to(device), inputs)
    with torch.autocast(device.type, enabled=False):
        return model(*args, **kwargs)
