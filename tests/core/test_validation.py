"""Malformed problems are refused with the name of the tensor and what was expected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import layer

from lightning_nettrim.core.validation import validate


def test_a_valid_problem_is_returned():
    problem = layer(bias=True, cascade=True, residual=True)
    assert validate(problem) is problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Y": torch.zeros(200, 3, dtype=torch.float64)}, r"W: expected shape \(40, 3\)"),
        ({"Y": torch.zeros(3, 12, dtype=torch.float64)}, r"Y: expected shape \(200, 12\)"),
        ({"W": torch.zeros(2, 2)}, "W: expected shape"),
        ({"epsilon": torch.tensor(0.0, dtype=torch.float64)}, "epsilon: expected > 0"),
        ({"epsilon": None}, "neither"),
        ({"epsilon": torch.tensor(1.0)}, "epsilon: expected torch.float64"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"Omega": torch.zeros(200, 12)}, "Omega: expected torch.bool"),
        ({"penalty": -torch.ones(40, dtype=torch.float64)}, "penalty"),
        ({"X": torch.full((200, 40), torch.nan, dtype=torch.float64)}, "X: expected finite"),
        ({"groups": 2}, "groups: expected a divisor of the batch"),
    ],
)
def test_malformed_problems_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        validate(replace(layer(), **change))


def test_a_problem_without_samples_is_refused():
    with pytest.raises(ValueError, match="X: expected at least one sample"):
        validate(replace(layer(P=1), X=torch.zeros(0, 40).double(), Y=torch.zeros(0, 12).double(), Omega=None))


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="float32 or float64"):
        validate(layer(dtype=torch.float16))
