"""Patterns: weights to blocks and back, counts, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lightning_nettrim import Pattern, parse_pattern

NAMES = ["unstructured", "per_neuron", "2:4", "4:8", "neuron", "2x4", "3x8"]


@dataclass(frozen=True)
class Halves(Pattern):
    """Blocks of half of the inputs of an output, ranked in each output."""

    parts: int = 2

    @property
    def name(self):
        return "halves"

    def block(self, N, M):
        return 1, N // self.parts

    def num_sets(self, N, M):
        return M


@pytest.mark.parametrize("name", NAMES)
def test_blocks_contain_every_weight_once_and_convert_back(name):
    W = torch.randn(2, 16, 6)
    blocks = parse_pattern(name).to_blocks(W)
    assert torch.equal(blocks.flatten().sort().values, W.flatten().sort().values)
    assert torch.equal(parse_pattern(name).from_blocks(blocks, 16, 6), W)


def test_blocks_are_what_their_names_say():
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


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_blocks_are_kept_in_each_set(name):
    pattern, score = parse_pattern(name), torch.rand(3, 16, 6)
    kept = pattern.kept_blocks(0.5, 16, 6)
    chosen = pattern.to_blocks(pattern.keep_largest(score, kept))
    assert torch.equal(chosen.all(-1), chosen.any(-1))
    sums = pattern.to_blocks(score).sum(-1)
    assert torch.equal(chosen.any(-1), sums >= sums.sort(-1, descending=True).values[..., kept - 1 : kept])


def test_only_n_of_m_determines_its_sparsity():
    assert parse_pattern("1:4").sparsity == 0.75
    assert parse_pattern("neuron").sparsity is None


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_is_parsed_from_its_name_and_itself(name):
    pattern = parse_pattern(name)
    assert pattern.name == str(pattern) == pattern.to_config() == name
    assert parse_pattern(pattern) is pattern


def test_a_pattern_of_another_module_is_parsed_from_its_class_path():
    config = Halves(4).to_config()
    assert config == {"class_path": f"{__name__}.Halves", "init_args": {"parts": 4}}
    assert parse_pattern(config) == Halves(4)


@pytest.mark.parametrize("class_path", ["nothing.Such", "torch.nn.Such", "torch.nn.Linear"])
def test_other_class_paths_are_refused(class_path):
    with pytest.raises(ValueError, match="pattern: expected the class path of a Pattern"):
        parse_pattern({"class_path": class_path, "init_args": {}})


@pytest.mark.parametrize("name", ["", "2:", "4:2", "4:4", "0:4", "x4", "2x", "rows", "2:4:8", "-1:4"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"pattern: expected .* got {name!r}"):
        parse_pattern(name)


@pytest.mark.parametrize(
    ("name", "what"), [("2:5", "5 inputs, got 16"), ("4x4", "4 outputs, got 6"), ("2x3", "3 inputs")]
)
def test_layers_that_a_pattern_does_not_divide_are_refused(name, what):
    with pytest.raises(ValueError, match=f"expected a multiple of {what}"):
        parse_pattern(name).check(16, 6)
