"""Rectifiers compute the activations of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_nettrim.core.activation import Rectifier

SLOPE = torch.tensor([0.0, 0.3, 1.0])
CASES = {
    "ReLU": (Rectifier(), F.relu),
    "clamp to [0, 6]": (Rectifier(0.0, 6.0), F.relu6),
    "clamp to [-1, 0.5]": (Rectifier(-1.0, 0.5), lambda U: F.hardtanh(U, -1, 0.5)),
    "LeakyReLU": (Rectifier(slope=torch.tensor(0.2)), lambda U: F.leaky_relu(U, 0.2)),
    "PReLU": (Rectifier(slope=SLOPE), lambda U: F.prelu(U, SLOPE)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_function_and_its_name(name):
    rectifier, function = CASES[name]
    U = 4 * torch.randn(50, 3)
    torch.testing.assert_close(rectifier(U), function(U))
    assert str(rectifier) == name


def test_active_is_strictly_between_the_bounds():
    Y = torch.tensor([-1.0, 0.0, 0.2, 0.5, 1.0])
    assert Rectifier().active(Y).tolist() == [False, False, True, True, True]
    assert Rectifier(-1.0, 0.5).active(Y).tolist() == [False, True, True, False, False]


def test_the_inverse_below_zero():
    rectifier, U = Rectifier(slope=torch.tensor(0.1)), -torch.rand(20)
    torch.testing.assert_close(rectifier.inverse(rectifier(U)), U)
    assert bool(Rectifier(slope=torch.tensor(0.0)).inverse(torch.zeros(3)).isfinite().all())


def test_only_equal_functions_are_equal():
    rectifiers = [Rectifier(), Rectifier(0.0, 6.0), Rectifier(-1.0), *(Rectifier(slope=s) for s in SLOPE)]
    for i, one in enumerate(rectifiers):
        assert [one.equals(other) for other in rectifiers] == [i == j for j in range(len(rectifiers))]
    assert Rectifier(slope=SLOPE).equals(Rectifier(slope=SLOPE.clone()))
