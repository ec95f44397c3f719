"""In-place assignment of parameters, and masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nettrim.layers import masking


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def test_values_are_assigned_in_place_all_or_none(model):
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"1.weight: expected a parameter of shape \(9, 9\), got \(2, 3\)"):
        masking.assign(model, {"0.weight": torch.zeros(3, 4), "1.weight": torch.zeros(9, 9)})
    with pytest.raises(ValueError, match="2.weight.*got none"):
        masking.assign(model, {"0.weight": torch.zeros(3, 4), "2.weight": torch.zeros(2, 3)})
    assert all(torch.equal(p, old) for p, old in before.values())
    masking.assign(model, {"0.weight": torch.zeros(3, 4)})
    assert dict(model.named_parameters())["0.weight"] is before["0.weight"][0]
    assert before["0.weight"][0].count_nonzero() == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_weights_are_restored_on_any_error(model, error):
    before = masking.clone(model, ["0.weight", "1.bias"])
    with pytest.raises(error), masking.restored_on_error(model, before):  # noqa: PT012
        masking.assign(model, {name: torch.zeros_like(value) for name, value in before.items()})
        raise error
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())


def test_applied_masks_give_exact_zeros_and_are_satisfied(model):
    masks = {"0.weight": torch.rand(3, 4) < 0.5}
    assert not masking.satisfied(model, masks)
    kept = model[0].weight.detach().clone()
    masking.apply(model, masks)
    assert masking.satisfied(model, masks)
    assert torch.equal(model[0].weight, kept * masks["0.weight"])
    assert not masking.satisfied(nn.Linear(2, 2), masks)


def test_sparsity_counts_exact_zeros():
    assert masking.sparsity({"a": torch.tensor([0.0, 1e-30, -0.0, 2.0]), "b": torch.ones(4)}) == 0.25
    assert masking.sparsity({}) == 0
