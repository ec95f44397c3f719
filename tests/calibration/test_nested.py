"""Nested batches are flattened and rebuilt."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch

from lightning_nettrim.calibration.nested import (
    common_length,
    count_inputs,
    flatten,
    map_tensors,
    tensors_of,
    to_device,
)


class Pair(NamedTuple):
    first: object
    second: object


BATCHES = [
    1,
    "text",
    [1, (2, 3)],
    {"a": 1, "b": [2, {"c": 3}]},
    OrderedDict(b=1, a=2),
    UserDict(a=1),
    Pair(1, Pair(2, [3])),
    [],
    (),
]


@pytest.mark.parametrize("batch", BATCHES, ids=repr)
def test_a_batch_is_rebuilt_from_its_leaves(batch):
    leaves, structure = flatten(batch)
    rebuilt = structure.build(iter(leaves))
    assert rebuilt == batch
    assert type(rebuilt) is type(batch)


def test_structures_are_equal_only_if_kinds_and_keys_are():
    structures = [flatten(batch)[1] for batch in ([1], (1,), {"a": 1}, {"b": 1}, [1, 2], Pair(1, 2), 1)]
    assert len(set(structures)) == len(structures)
    assert flatten({"a": [1]})[1] == flatten({"a": ["x"]})[1]


def test_functions_are_applied_to_tensors_only():
    batch = {"x": torch.ones(2), "y": [torch.zeros(3), "label", None]}
    mapped = map_tensors(batch, lambda tensor: tensor + 1)
    assert [tensor.tolist() for tensor in tensors_of(mapped)] == [[2, 2], [1, 1, 1]]
    assert mapped["y"][1:] == ["label", None]
    assert torch.equal(batch["x"], torch.ones(2))


def test_leaves_with_a_method_to_are_moved():
    class Graph:
        device = "cpu"

        def to(self, device):
            self.device = str(device)
            return self

    x, graph, number = to_device([torch.ones(2), Graph(), 3], torch.device("meta"))
    assert (x.device.type, graph.device, number) == ("meta", "meta", 3)


@pytest.mark.parametrize(
    ("batch", "length", "inputs"),
    [
        ([torch.ones(4, 2), {"y": torch.ones(4)}], 4, 4),
        ([torch.ones(4, 2), torch.ones(3)], None, 4),
        ([torch.ones(4, 2), torch.tensor(1.0)], None, 4),
        (["text"], None, 1),
        ([torch.tensor(1.0), torch.ones(3)], None, 3),
        (torch.ones(0, 2), 0, 1),
    ],
)
def test_lengths(batch, length, inputs):
    assert common_length(batch) == length
    assert count_inputs(batch) == inputs
