"""A uniform sample of bounded size of the inputs in one pass over a data loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.batch import CalibrationBatch, Forward, call, inputs_are_independent
from lightning_nettrim.calibration.calibration_set import CalibrationSet
from lightning_nettrim.calibration.nested import Structure, common_length, count_inputs, flatten
from lightning_nettrim.calibration.reservoir import Reservoir
from lightning_nettrim.calibration.stored_batch import TENSOR, StoredBatch, Template
from lightning_nettrim.runtime.offload import StoredTensors, TensorStore


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
        leaves = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if length is not None and divisible.get(structure):
            width = max(width, length)
            reservoir.offer(tensors, Template(leaves, structure, True))
        else:
            selected, keys = reservoir.pick(count_inputs(batch), whole=True)
            if len(selected):
                reservoir.keep(keys, [], Template(leaves, structure, False, store.put(tensors)))
    if not reservoir.seen:
        raise ValueError("expected batches to calibrate on, got none: the loader is empty, or a generator is exhausted")
    chunks = reservoir.chunks()
    inputs = reservoir.size if reservoir.seen > reservoir.size else reservoir.seen
    return CalibrationSet(
        [_concatenated(group, store) for group in _groups(chunks, reservoir.labels, width)], inputs, forward
    )


def _groups(
    chunks: list[StoredTensors], templates: list[Template], width: int
) -> Iterator[list[tuple[list[Tensor], Template]]]:
    """Groups of consecutive chunks that form one batch of at most ``width`` rows.

    The lists are emptied in the process, so that no input is in memory twice.
    """
    group: list[tuple[list[Tensor], Template]] = []
    while chunks:
        tensors, template = chunks.pop(0).load(), templates.pop(0)
        if group and not _can_be_concatenated([*group, (tensors, template)], width):
            yield group
            group = []
        group.append((tensors, template))
    yield group


def _can_be_concatenated(group: Sequence[tuple[list[Tensor], Template]], width: int) -> bool:
    """Whether the last chunk matches the one before, and all together have at most ``width`` rows."""
    *_, (previous, previous_template), (tensors, template) = group
    matching = previous_template.matches(template) and _row_types(previous) == _row_types(tensors)
    return matching and sum(len(tensors[0]) for tensors, _ in group) <= width


def _row_types(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Shape and dtype of a row of each tensor."""
    return [(t.shape[1:], t.dtype) for t in tensors]


def _concatenated(group: Sequence[tuple[list[Tensor], Template]], store: TensorStore) -> StoredBatch:
    """The batch of a group of chunks, or the only batch of a group that is not divisible."""
    parts, templates = zip(*group, strict=True)
    if templates[0].tensors is not None:
        return StoredBatch(templates[0].tensors, templates[0])
    return StoredBatch(store.put([torch.cat(tensors) for tensors in zip(*parts, strict=True)]), templates[0])
