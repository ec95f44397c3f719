"""Patterns: groups there and back, counts, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lightning_nettrim import Pattern

NAMES = ["unstructured", "per_neuron", "2:4", "4:8", "neuron", "2x4", "3x8"]


@pytest.mark.parametrize("name", NAMES)
def test_groups_hold_every_weight_once_and_come_back(name):
    W = torch.randn(2, 16, 6)
    groups = parse_pattern(name).to_blocks(W)
    assert torch.equal(groups.flatten().sort().values, W.flatten().sort().values)
    assert torch.equal(parse_pattern(name).from_blocks(groups, 16, 6), W)


def test_groups_are_what_their_names_say():
    weight = torch.arange(6 * 16).reshape(6, 16)  # outputs by inputs, as in a layer
    W = weight.mT
    assert parse_pattern("2:4").to_blocks(W)[0, :, 0].tolist() == [0, 1, 2, 3]
    assert parse_pattern("2:4").to_blocks(W)[4, :, 0].tolist() == [16, 17, 18, 19]
    assert parse_pattern("per_neuron").to_blocks(W)[1, :, 0].tolist() == list(range(16, 32))
    assert parse_pattern("neuron").to_blocks(W)[0, 1].tolist() == list(range(16, 32))
    assert parse_pattern("2x4").to_blocks(W)[0, 0].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    assert parse_pattern("2x4").to_blocks(W)[0, 1].tolist() == [4, 5, 6, 7, 20, 21, 22, 23]


@pytest.mark.parametrize(
    ("name", "sparsity", "nonzeros"),
    [
        ("unstructured", 0.9, 10),
        ("unstructured", 0.901, 10),
        ("per_neuron", 0.9, 12),
        ("2:4", 0.5, 48),
        ("1:4", 0.9, 24),
        ("neuron", 0.5, 48),
        ("2x4", 0.75, 24),
    ],
)
def test_counts(name, sparsity, nonzeros):
    assert parse_pattern(name).nonzeros(sparsity, 16, 6) == nonzeros


def test_the_sparsity_of_n_of_m_is_its_own():
    assert parse_pattern("1:4").sparsity == 0.75
    assert parse_pattern("neuron").sparsity is None


@pytest.mark.parametrize("name", ["", "2:", "4:2", "4:4", "0:4", "x4", "2x", "rows", "2:4:8", "-1:4"])
def test_refuses_names_that_are_none(name):
    with pytest.raises(ValueError, match=f"pattern: expected .* got {name!r}"):
        parse_pattern(name)


@pytest.mark.parametrize(
    ("name", "what"), [("2:5", "5 inputs, got 16"), ("4x4", "4 outputs, got 6"), ("2x3", "3 inputs")]
)
def test_refuses_layers_that_it_does_not_divide(name, what):
    with pytest.raises(ValueError, match=f"expected a multiple of {what}"):
        parse_pattern(name).check(16, 6)
