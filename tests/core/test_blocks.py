"""Inputs in blocks of rows."""

from __future__ import annotations

import torch

from lightning_nettrim.core.blocks import input_blocks


def test_inputs_on_the_device_are_one_block():
    X = torch.randn(2, 50, 3)
    ((rows, block),) = input_blocks(X, torch.device("cpu"))
    assert rows == slice(None)
    assert block is X


def test_inputs_on_another_device_are_blocks_of_rows(monkeypatch):
    """The meta device stands for an accelerator; it has shapes, but no values."""
    monkeypatch.setattr("lightning_nettrim.core.blocks.BLOCK", 6)
    X = torch.randn(2, 50, 3)
    blocks = list(input_blocks(X, torch.device("meta")))
    assert [rows for rows, _ in blocks] == [slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 50)]
    assert [block.shape for _, block in blocks] == [(2, 16, 3)] * 3 + [(2, 2, 3)]
    assert {block.device.type for _, block in blocks} == {"meta"}
