"""Padded tokens are found by the masks with which modules are called, and are not recorded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.padding import PaddingMasks
from lightning_nettrim.calibration.recording import record
from lightning_nettrim.layers import find_layers

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([6, 4, 1, 3])
MASK = torch.arange(6) < TOKENS[:, None]


class Masked(nn.Module):
    """Two Linear layers, with an attention mask as an argument of the network."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, attention_mask=None):
        return self.b(self.a(x).relu())


class Encoder(nn.Module):
    """A layer of torch's transformer, which is called with the positions of the padding."""

    def __init__(self, batch_first):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x, padded):
        return self.head(self.layer(x, src_key_padding_mask=padded))


class Decoder(nn.Module):
    """Attends to encoded tokens, which have a mask of their own."""

    def __init__(self):
        super().__init__()
        self.own, self.memory = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, encoder_hidden_states=None, attention_mask=None, encoder_attention_mask=None):
        return self.own(x), self.memory(encoder_hidden_states)


def recorded(model, batch):
    layers = find_layers(model)[0]
    with evaluation_mode(model):
        return record(model, layers, [CalibrationBatch(batch)], num_samples=10**5, seed=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_only_tokens_are_recorded(dtype):
    recordings = recorded(Masked(), {"x": X, "attention_mask": MASK.to(dtype)})
    assert torch.equal(recordings["a"].X, X[MASK])
    assert recordings["a"].total_rows == recordings["b"].total_rows == int(TOKENS.sum())


def test_all_positions_are_recorded_without_a_mask():
    assert torch.equal(recorded(Masked(), {"x": X})["a"].X, X.flatten(0, 1))


def test_a_mask_of_another_shape_is_not_used():
    recordings = recorded(Masked(), {"x": X, "attention_mask": torch.ones(4, 9)})
    assert recordings["a"].total_rows == 24


@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_of_torch_are_those_of_the_padding(batch_first):
    x = X if batch_first else X.transpose(0, 1)
    model = Encoder(batch_first).eval()
    recordings = recorded(model, (x, ~MASK))
    assert recordings["layer.linear1"].total_rows == int(TOKENS.sum())
    assert recordings["layer.self_attn.in_proj"].total_rows == int(TOKENS.sum())
    assert recordings["head"].total_rows == 24  # it is called outside the layer that has the mask
    assert torch.equal(recordings["layer.self_attn.in_proj"].X, x[MASK if batch_first else MASK.mT])


@pytest.mark.parametrize(
    ("own", "encoder", "rows"),
    [(True, True, (14, 9)), (True, False, (14, 24)), (False, True, (24, 9)), (False, False, (24, 24))],
)
def test_encoded_tokens_have_a_mask_of_their_own(own, encoder, rows):
    encoder_mask = torch.arange(6) < torch.tensor([2, 3, 1, 3])[:, None]
    batch = {"x": X, "encoder_hidden_states": X.clone(), "attention_mask": MASK if own else None}
    batch["encoder_attention_mask"] = encoder_mask if encoder else None
    recordings = recorded(Decoder(), batch)
    assert (recordings["own"].total_rows, recordings["memory"].total_rows) == rows


def test_hooks_are_removed_also_after_an_error():
    model, masks = Masked(), PaddingMasks()
    with pytest.raises(RuntimeError), masks.followed(model):
        model(torch.ones(4, 6, 9), attention_mask=MASK)
    masks.forget()
    assert masks.kept((4, 6)) is None
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
