"""Calibration inputs of `trim`: padded tokens are left out, and inputs and rows have limits of their own."""

import pytest
import torch
from torch import nn

from lightning_nettrim import Cardinality, trim


class MaskedTokens(nn.Module):
    """Tokens through an encoder with a padding mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.block = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.head = nn.Linear(12, 11)

    def forward(self, ids, attention_mask):
        return self.head(self.block(self.embed(ids), src_key_padding_mask=attention_mask == 0))


@pytest.mark.parametrize(
    "form", [tuple, lambda pair: dict(zip(("ids", "attention_mask"), pair, strict=True))], ids=["tuple", "dict"]
)
def test_padded_tokens_are_left_out(form):
    torch.manual_seed(0)
    lengths = torch.randint(2, 9, (40,))
    mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1, 11, (40, 9))
    results = []
    for padding in (torch.zeros_like(ids), torch.full_like(ids, 7)):
        torch.manual_seed(1)
        model = MaskedTokens().eval()
        padded = torch.where(mask == 1, ids, padding)
        batches = [form(pair) for pair in zip(padded.split(10), mask.split(10), strict=True)]
        trim(model, batches, sparsity=0.5, allocate="uniform", solver=Cardinality(max_steps=50))
        results.append(model.state_dict())
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])


def test_the_number_of_rows_is_not_limited_by_the_number_of_inputs():
    torch.manual_seed(0)
    sequences = torch.randn(20, 50, 12)
    errors = {}
    for max_rows in (None, 64):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 12)).eval()
        with torch.no_grad():
            dense = model(sequences)
            trim(model, sequences.split(4), sparsity=0.6, num_samples=32, max_rows=max_rows, allocate="uniform")
            errors[max_rows] = float((model(sequences) - dense).norm() / dense.norm())
    assert errors[None] < 0.9 * errors[64]
