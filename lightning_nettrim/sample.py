"""Sample: a bounded, uniform, replayable sample of the inputs of one pass over a loader, and of any stream of rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_ROWS = object()  # stands, in the form of a batch, where a tensor's sampled rows go


class Reservoir:
    """A uniform sample of at most ``size`` rows of a stream, in the stream's order; the same for the same row counts.

    Every row draws a uniform key; the ``size`` smallest keys stay (bottom-k sampling).
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seen = size, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._threshold = float("inf")
        self._keys: list[Tensor] = []
        self._chunks: list[list[Tensor]] = []

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
        self._chunks.append([t.detach() for t in tensors])
        if sum(map(len, self._keys)) > 2 * self.size:
            self._shrink()

    def offer(self, tensors: Sequence[Tensor]) -> bool:
        """Show rows that lie in several tensors of one length; returns whether any of them stays, for now."""
        chosen, keys = self.pick(len(tensors[0]))
        self.keep(keys, [t.index_select(0, chosen.to(t.device)) for t in tensors])
        return len(chosen) > 0

    def chunks(self) -> list[list[Tensor]]:
        """The sample, one entry for each offer of which rows are left."""
        if sum(map(len, self._keys)) > self.size:
            self._shrink()
        return self._chunks

    def _shrink(self) -> None:
        self._threshold = float(torch.cat(self._keys).kthvalue(self.size).values)
        kept = [(keys <= self._threshold).nonzero().squeeze(1) for keys in self._keys]
        pairs = [(i, keep) for i, keep in enumerate(kept) if len(keep)]
        self._chunks = [[t.index_select(0, keep.to(t.device)) for t in self._chunks[i]] for i, keep in pairs]
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


def hold(model: nn.Module, batches: Iterable[Any], num_samples: int, seed: int) -> list[Inputs]:
    """A uniform sample of at most ``num_samples`` inputs of one pass over ``batches``, kept on the CPU.

    The pass happens once, so that generators, shuffling and augmentation are safe; what is returned can be replayed.
    A batch whose tensors do not share a first dimension counts as one input and is kept or dropped whole.

    Raises:
        ValueError: for batches that hold no input.
    """
    reservoir, width = Reservoir(num_samples, seed), 1
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
        if reservoir.offer([torch.full((length,), index), *(t.cpu() for t in tensors)]):
            forms[index] = leaves, tree
    if not reservoir.seen:
        raise ValueError("expected batches to calibrate on, got none: the loader is empty, or a generator is exhausted")
    held = []
    for number, *tensors in reservoir.chunks():
        leaves, tree = forms[int(number[0])]
        parts = iter(tensors)
        held.append(([next(parts) if leaf is _ROWS else leaf for leaf in leaves], tree))
    return [tree_unflatten(leaves, tree) for leaves, tree in _merged(held, width)]


def _merged(held: list[tuple[list[Any], Any]], width: int) -> list[tuple[list[Any], Any]]:
    """Neighbouring chunks of one form joined up to ``width`` rows, so that a replay has few batches."""
    groups: list[tuple[list[list[Any]], Any]] = []
    for leaves, tree in held:
        if groups and groups[-1][1] == tree and _joinable([*groups[-1][0], leaves], width):
            groups[-1][0].append(leaves)
        else:
            groups.append(([leaves], tree))
    return [
        ([torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*group, strict=True)], tree)
        for group, tree in groups
    ]


def _joinable(group: list[list[Any]], width: int) -> bool:
    """Whether chunks hold nothing but tensors of one form whose rows fit a batch."""
    if not all(isinstance(leaf, Tensor) and leaf.dim() for leaves in group for leaf in leaves):
        return False
    forms = {tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves) for leaves in group}
    return len(forms) == 1 and sum(len(leaves[0]) for leaves in group) <= width


def _to(device: torch.device | str) -> Callable[[Any], Any]:
    return lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model on held inputs, on the device of its parameters, with autocast off."""
    device = next(model.parameters()).device
    args, kwargs = tree_map(_to(device), inputs)
    with torch.autocast(device.type, enabled=False):
        return model(*args, **kwargs)
