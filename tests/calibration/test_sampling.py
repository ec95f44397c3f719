"""Uniform samples of bounded size, of rows and of calibration inputs."""

from __future__ import annotations

import pytest
import torch
from processes import run_processes
from torch import nn

from lightning_nettrim.calibration.reservoir import Reservoir
from lightning_nettrim.calibration.sampling import sample_inputs
from lightning_nettrim.runtime.distributed import ProcessGroup
from lightning_nettrim.runtime.memory import MemoryMeter


def inputs_of(calibration_set):
    """All inputs of a calibration set of tensors."""
    return torch.cat([batch.batch for batch in calibration_set])


class Named(nn.Module):
    def forward(self, ids, mask=None):
        return ids


@pytest.mark.parametrize(("rows", "size"), [(10, 100), (100, 100), (1000, 100), (1001, 7)])
def test_a_reservoir_keeps_at_most_its_size_in_order_without_repetition(rows, size):
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


def test_the_sample_depends_on_the_numbers_of_rows_only():
    samples = []
    for values in (torch.arange(500), -torch.arange(500)):
        reservoir = Reservoir(40, seed=3)
        for part in values.split(30):
            reservoir.offer([part])
        samples.append(torch.cat([c.load()[0] for c in reservoir.chunks()]))
    assert torch.equal(samples[0], -samples[1])


def test_another_seed_gives_other_rows():
    rows = torch.arange(1000.0).unsqueeze(1)
    one, same, other = (inputs_of(sample_inputs(nn.Identity(), rows.split(50), 60, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_inputs_are_copies_from_one_pass_over_a_generator():
    source = torch.arange(12.0).reshape(6, 2)
    calibration_set = sample_inputs(nn.Identity(), (part for part in source.split(2)), 100, 0)
    source.zero_()
    assert torch.equal(inputs_of(calibration_set), torch.arange(12.0).reshape(6, 2))
    assert [len(batch.batch) for batch in calibration_set] == [2, 2, 2]


def test_small_chunks_are_concatenated_up_to_the_size_of_a_batch():
    rows = torch.arange(10_000.0).unsqueeze(1)
    calibration_set = sample_inputs(nn.Identity(), rows.split(100), 500, 0)
    assert sum(len(batch.batch) for batch in calibration_set) == 500
    assert len(calibration_set) <= 7
    assert max(len(batch.batch) for batch in calibration_set) <= 100


def test_batches_of_different_shapes_are_not_concatenated():
    calibration_set = sample_inputs(nn.Identity(), [torch.ones(3, 5), torch.ones(2, 7)], 100, 0)
    assert [tuple(batch.batch.shape) for batch in calibration_set] == [(3, 5), (2, 7)]


def test_batches_without_a_common_length_are_not_split():
    batches = [{"ids": torch.ones(4, 3), "mask": torch.ones(2)}, {"ids": torch.ones(5, 3), "mask": torch.ones(1)}]
    calibration_set = sample_inputs(Named(), batches, 100, 0)
    assert [tuple(batch.batch["ids"].shape) for batch in calibration_set] == [(4, 3), (5, 3)]


def test_arguments_that_are_none_stay_none():
    batch, *_ = sample_inputs(Named(), [{"ids": torch.ones(4, 3), "mask": None}], 100, 0)
    assert batch.batch["mask"] is None


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


def test_batches_whose_first_dimension_is_not_the_batch_dimension_are_not_split():
    calibration_set = sample_inputs(TimeFirst(), [torch.randn(8, 4, 3) for _ in range(20)], 40, 0)
    assert [batch.batch.shape for batch in calibration_set] == [(8, 4, 3)] * 5
    images = [[torch.randn(3, 8, 8), torch.randn(3, 8, 8)] for _ in range(20)]
    calibration_set = sample_inputs(Images(), images, 12, 0, forward=lambda model, batch: model(batch))
    assert [[tuple(image.shape) for image in batch.batch] for batch in calibration_set] == [[(3, 8, 8)] * 2] * 4


def test_batches_that_are_not_split_are_a_uniform_sample_as_well():
    batches = [torch.full((8, 4, 3), float(i)) + torch.rand(8, 4, 3) for i in range(40)]
    chosen = torch.zeros(40)
    for seed in range(60):
        for batch in sample_inputs(TimeFirst(), batches, 80, seed):
            chosen[int(batch.batch.min())] += 1
    assert chosen.sum() == 600
    assert 3 <= chosen.min() <= chosen.max() <= 29  # 15 expected of each, four standard deviations either way


def test_concatenated_batches_keep_the_order_of_rows_in_all_tensors():
    pairs = [(torch.arange(10.0).reshape(10, 1) + 10 * i, torch.arange(10) + 10 * i) for i in range(30)]
    calibration_set = sample_inputs(nn.Linear(1, 1), pairs, 45, 0)
    x, y = (torch.cat(parts) for parts in zip(*(batch.batch for batch in calibration_set), strict=True))
    assert torch.equal(x.squeeze(1).long(), y)
    assert len(y) == 45


def test_smaller_batches_have_the_same_inputs():
    model, x = nn.Linear(3, 3), torch.randn(1200, 3)
    calibration_set = sample_inputs(model, x.split(100), 500, 0)
    halves = calibration_set.with_smaller_batches()
    assert len(halves) == 2 * len(calibration_set)
    assert torch.equal(inputs_of(calibration_set), inputs_of(halves))
    assert max(len(batch.batch) for batch in halves.with_smaller_batches()) <= 25


def test_the_first_inputs_are_in_the_first_batches():
    x = torch.randn(1000, 3)
    calibration_set = sample_inputs(nn.Linear(3, 3), x.split(100), 1000, 0)
    assert torch.equal(inputs_of(calibration_set.first(310)), x[:300])
    assert torch.equal(inputs_of(calibration_set[2:4]), x[200:400])


class BesideAnother(ProcessGroup):
    """Two processes, of which the other one has a given number of batches."""

    batches = 0

    def gather(self, value):
        return [value, self.batches]


@pytest.mark.parametrize(("batches", "expected"), [(2, 2), (4, 4), (5, 5), (15, 15), (2000, 1000)])
def test_processes_that_run_together_have_equally_many_batches(batches, expected):
    x, other = torch.randn(1000, 3), BesideAnother(2)
    other.__class__.batches = batches
    calibration_set = sample_inputs(nn.Linear(3, 3), x.split(250), 1000, 0).run_together(other)
    assert len(calibration_set) == expected
    kept = 1000 if expected >= 4 else 250 * expected
    assert torch.equal(inputs_of(calibration_set), x[:kept])


def sample_large_inputs():
    """Sample 735 MiB and print the peak of the memory."""
    meter = MemoryMeter(torch.device("cpu"))
    batches = (torch.ones(32, 3 * 224 * 224) for _ in range(40))
    calibration_set = sample_inputs(nn.Identity(), batches, 1280, 0)
    print(meter.read_peak())
    del calibration_set


@pytest.mark.slow
def test_memory_between_stored_inputs_is_returned_to_the_system(tmp_path):
    """In a process of its own, where no other memory is freed at the same time."""
    (done,) = run_processes(sample_large_inputs, [()], tmp_path)
    assert 735 <= int(done.printed) / 2**20 < 1.4 * 735
