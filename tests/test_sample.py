"""The bounded sample: uniform, seeded, aligned, replayable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nettrim.sample import Reservoir, hold, inputs_of


def flat(model, held):
    return torch.cat([args[0] for args, _ in held])


class Named(nn.Module):
    def forward(self, ids, mask=None):
        return ids


@pytest.mark.parametrize(("rows", "size"), [(10, 100), (100, 100), (1000, 100), (1001, 7)])
def test_a_reservoir_keeps_at_most_its_size_in_order_and_without_repetition(rows, size):
    reservoir = Reservoir(size, seed=0)
    for part in torch.arange(rows).split(13):
        reservoir.offer([part, 2 * part])
    first, second = (torch.cat(parts) for parts in zip(*(c.load() for c in reservoir.chunks()), strict=True))
    assert len(first) == min(rows, size)
    assert reservoir.seen == rows
    assert torch.equal(first, first.unique(sorted=True))
    assert torch.equal(second, 2 * first)


def test_a_reservoir_is_uniform_over_the_stream():
    counts = torch.zeros(20)
    for seed in range(400):
        reservoir = Reservoir(50, seed)
        for part in torch.arange(1000).split(64):
            reservoir.offer([part])
        counts += (
            torch.cat([c.load()[0] for c in reservoir.chunks()]).div(50, rounding_mode="floor").bincount(minlength=20)
        )
    expected = counts.mean()
    assert expected == 400 * 50 / 20
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert 6.8 < chi_squared < 38.6  # 19 degrees of freedom, one in two hundred on either side


def test_the_same_row_counts_give_the_same_rows_whatever_the_values():
    samples = []
    for values in (torch.arange(500), -torch.arange(500)):
        reservoir = Reservoir(40, seed=3)
        for part in values.split(30):
            reservoir.offer([part])
        samples.append(torch.cat([c.load()[0] for c in reservoir.chunks()]))
    assert torch.equal(samples[0], -samples[1])


def test_seeds_give_other_rows():
    rows = torch.arange(1000.0).unsqueeze(1)
    one, same, other = (flat(None, hold(nn.Identity(), rows.split(50), 60, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_held_inputs_are_copies_of_a_generator_read_once():
    source = torch.arange(12.0).reshape(6, 2)
    held = hold(nn.Identity(), (batch for batch in source.split(2)), 100, 0)
    source.zero_()
    assert torch.equal(flat(None, held), torch.arange(12.0).reshape(6, 2))
    assert [len(args[0]) for args, _ in held] == [2, 2, 2]


def test_small_chunks_are_joined_up_to_a_batch():
    rows = torch.arange(10_000.0).unsqueeze(1)
    held = hold(nn.Identity(), rows.split(100), 500, 0)
    assert sum(len(args[0]) for args, _ in held) == 500
    assert len(held) <= 7
    assert max(len(args[0]) for args, _ in held) <= 100


def test_ragged_batches_are_kept_in_their_shapes():
    held = hold(nn.Identity(), [torch.ones(3, 5), torch.ones(2, 7)], 100, 0)
    assert [tuple(args[0].shape) for args, _ in held] == [(3, 5), (2, 7)]


def test_mappings_keep_what_forward_names():
    batches = [{"ids": torch.ones(4, 3), "label": torch.zeros(4), "mask": torch.ones(4, 1)}] * 2
    for args, kwargs in hold(Named(), batches, 100, 0):
        assert args == ()
        assert set(kwargs) == {"ids", "mask"}


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        (1, (1,), {}),
        ((1, 2), (1,), {}),
        ([1, 2], (1,), {}),
        ({"ids": 1, "y": 2}, (), {"ids": 1}),
        (({"ids": 1}, 2), (), {"ids": 1}),
        ({"pixels": 1}, ({"pixels": 1},), {}),
    ],
)
def test_the_arguments_of_a_batch(batch, args, kwargs):
    assert inputs_of(Named(), batch) == (args, kwargs)


def test_batches_without_a_common_length_are_kept_whole():
    batches = [{"ids": torch.ones(4, 3), "mask": torch.ones(2)}, {"ids": torch.ones(5, 3), "mask": torch.ones(1)}]
    held = hold(Named(), batches, 100, 0)
    assert [tuple(kwargs["ids"].shape) for _, kwargs in held] == [(4, 3), (5, 3)]


def test_arguments_that_are_none_stay_none():
    (_, kwargs), *_ = hold(Named(), [{"ids": torch.ones(4, 3), "mask": None}], 100, 0)
    assert kwargs["mask"] is None


@pytest.mark.parametrize("batches", [[], iter(()), [torch.ones(0, 3)]])
def test_no_inputs_are_refused(batches):
    with pytest.raises(ValueError, match="empty"):
        hold(nn.Identity(), batches, 100, 0)
