"""The bounded sample: uniform, seeded, aligned, replayable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nettrim.calibration.batch import AmbiguousBatch, arguments
from lightning_nettrim.calibration.sampling import Reservoir, sample_inputs


def flat(model, held):
    return torch.cat([replay.batch for replay in held])


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
    one, same, other = (flat(None, sample_inputs(nn.Identity(), rows.split(50), 60, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_held_inputs_are_copies_of_a_generator_read_once():
    source = torch.arange(12.0).reshape(6, 2)
    held = sample_inputs(nn.Identity(), (batch for batch in source.split(2)), 100, 0)
    source.zero_()
    assert torch.equal(flat(None, held), torch.arange(12.0).reshape(6, 2))
    assert [len(replay.batch) for replay in held] == [2, 2, 2]


def test_small_chunks_are_joined_up_to_a_batch():
    rows = torch.arange(10_000.0).unsqueeze(1)
    held = sample_inputs(nn.Identity(), rows.split(100), 500, 0)
    assert sum(len(replay.batch) for replay in held) == 500
    assert len(held) <= 7
    assert max(len(replay.batch) for replay in held) <= 100


def test_ragged_batches_are_kept_in_their_shapes():
    held = sample_inputs(nn.Identity(), [torch.ones(3, 5), torch.ones(2, 7)], 100, 0)
    assert [tuple(replay.batch.shape) for replay in held] == [(3, 5), (2, 7)]


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        (1, (1,), {}),
        ((1,), (1,), {}),
        ({"ids": 1, "y": 2}, (), {"ids": 1}),
        (({"ids": 1}, 2), (), {"ids": 1}),
        ({"pixels": 1}, ({"pixels": 1},), {}),
    ],
)
def test_the_arguments_of_a_batch(batch, args, kwargs):
    assert arguments(Named(), batch) == (args, kwargs)


class Single(nn.Module):
    def forward(self, x):
        return x


class Pair(nn.Module):
    def forward(self, x, scale):
        return x * scale


class Whole(nn.Module):
    def forward(self, batch):
        return batch


class Any(nn.Module):
    def forward(self, **inputs):
        return inputs


class Several(nn.Module):
    def forward(self, *inputs):
        return inputs


@pytest.mark.parametrize(
    ("model", "batch", "args", "kwargs"),
    [
        (Single(), (1, 2), (1,), {}),
        (Single(), [1, 2, 3], (1,), {}),
        (Pair(), (1, 2), (1, 2), {}),
        (Pair(), (1, 2, 3), (1, 2), {}),
        (Whole(), 1, (1,), {}),
        (Any(), {"a": 1, "b": 2}, (), {"a": 1, "b": 2}),
        (Several(), (1,), (1,), {}),
    ],
)
def test_as_many_elements_of_a_tuple_are_passed_as_forward_requires(model, batch, args, kwargs):
    assert arguments(model, batch) == (args, kwargs)


@pytest.mark.parametrize(
    ("model", "batch"), [(Named(), (1, 2)), (Named(), [1, 2, 3]), (Whole(), (1, 2)), (Several(), (1, 2))]
)
def test_a_tuple_whose_further_elements_could_be_arguments_is_refused(model, batch):
    with pytest.raises(AmbiguousBatch, match=r"could take one element or more: .* forward=lambda model, batch"):
        arguments(model, batch)


def test_batches_without_a_common_length_are_kept_whole():
    batches = [{"ids": torch.ones(4, 3), "mask": torch.ones(2)}, {"ids": torch.ones(5, 3), "mask": torch.ones(1)}]
    held = sample_inputs(Named(), batches, 100, 0)
    assert [tuple(replay.batch["ids"].shape) for replay in held] == [(4, 3), (5, 3)]


def test_arguments_that_are_none_stay_none():
    replay, *_ = sample_inputs(Named(), [{"ids": torch.ones(4, 3), "mask": None}], 100, 0)
    assert replay.batch["mask"] is None


@pytest.mark.parametrize("batches", [[], iter(()), [torch.ones(0, 3)]])
def test_no_inputs_are_refused(batches):
    with pytest.raises(ValueError, match="empty"):
        sample_inputs(nn.Identity(), batches, 100, 0)


class TimeFirst(nn.Module):
    """Attends along the first dimension."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(torch.softmax(x.sum(-1), 0).unsqueeze(-1) * x)


class Images(nn.Module):
    """Takes a list of images of any size, as detectors do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, images):
        return [self.conv(image) for image in images]


def test_batches_whose_first_dimension_is_not_of_their_inputs_are_kept_whole():
    held = sample_inputs(TimeFirst(), [torch.randn(8, 4, 3) for _ in range(20)], 40, 0)
    assert [replay.batch.shape for replay in held] == [(8, 4, 3)] * 5
    images = [[torch.randn(3, 8, 8), torch.randn(3, 8, 8)] for _ in range(20)]
    held = sample_inputs(Images(), images, 12, 0, forward=lambda model, batch: model(batch))
    assert [[tuple(image.shape) for image in replay.batch] for replay in held] == [[(3, 8, 8)] * 2] * 4


def test_whole_batches_are_a_uniform_sample_too():
    batches = [torch.full((8, 4, 3), float(i)) + torch.rand(8, 4, 3) for i in range(40)]
    chosen = torch.zeros(40)
    for seed in range(60):
        for replay in sample_inputs(TimeFirst(), batches, 80, seed):
            chosen[int(replay.batch.min())] += 1
    assert chosen.sum() == 600
    assert 3 <= chosen.min() <= chosen.max() <= 29  # 15 expected of each, four standard deviations either way


def test_a_joined_batch_keeps_the_order_of_its_parts_in_all_tensors():
    pairs = [(torch.arange(10.0).reshape(10, 1) + 10 * i, torch.arange(10) + 10 * i) for i in range(30)]
    held = sample_inputs(nn.Linear(1, 1), pairs, 45, 0)
    x, y = (torch.cat(parts) for parts in zip(*(replay.batch for replay in held), strict=True))
    assert torch.equal(x.squeeze(1).long(), y)
    assert len(y) == 45


def test_random_numbers_of_a_replay_are_its_own_and_leave_the_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    held = sample_inputs(nn.Linear(2, 2), torch.ones(40, 2).split(10), 40, 0, forward=lambda model, x: torch.rand(3))
    model = nn.Identity()
    one, again, other = held[0](model), held[0](model), held[1](model)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())
