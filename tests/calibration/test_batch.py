"""Batches: the arguments of the model, evaluation mode, random numbers, independent inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nettrim.calibration.batch import (
    AmbiguousBatch,
    CalibrationBatch,
    arguments,
    evaluation_mode,
    inputs_are_independent,
)
from lightning_nettrim.calibration.sampling import sample_inputs


class Named(nn.Module):
    def forward(self, ids, mask=None):
        return ids


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


def test_a_batch_has_its_own_random_numbers_and_does_not_change_the_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    calibration_set = sample_inputs(
        nn.Linear(2, 2), torch.ones(40, 2).split(10), 40, 0, forward=lambda model, x: torch.rand(3)
    )
    model = nn.Identity()
    one, again, other = calibration_set[0](model), calibration_set[0](model), calibration_set[1](model)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_mode_is_left_with_every_mode_as_it_was():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), evaluation_mode(model):  # noqa: PT012
        assert not any(module.training for module in model.modules())
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert torch.is_grad_enabled()


def test_a_part_of_a_batch_has_the_same_rows_of_all_tensors():
    batch = CalibrationBatch({"x": torch.arange(6).reshape(6, 1), "y": [torch.arange(6), "label"]})
    part = batch.part(slice(2, 4)).batch
    assert part["x"].flatten().tolist() == part["y"][0].tolist() == [2, 3]
    assert part["y"][1] == "label"
    assert batch.shapes() == [(6, 1), (6,)]


class Mean(nn.Module):
    """Subtracts the mean over one dimension before a Linear layer."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.fc = dim, nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x - x.mean(self.dim, keepdim=True))


@pytest.mark.parametrize(("model", "independent"), [(nn.Linear(3, 3), True), (Mean(1), True), (Mean(0), False)])
def test_inputs_are_independent_if_a_part_of_a_batch_gives_the_same_activations(model, independent):
    x = torch.randn(8, 5, 3)
    assert inputs_are_independent(model, CalibrationBatch(x), 8) == independent
    assert not inputs_are_independent(model, CalibrationBatch(x[:1]), 1)


def test_inputs_are_not_independent_if_the_model_fails_on_a_part():
    def forward(model, x):
        assert len(x) == 8
        return model(x)

    assert not inputs_are_independent(nn.Linear(3, 3), CalibrationBatch(torch.randn(8, 3), forward), 8)
