"""Fingerprints differ if and only if contents do."""

from __future__ import annotations

import torch

from lightning_nettrim.runtime.fingerprint import fingerprint


def test_different_contents_have_different_fingerprints():
    values = [
        torch.ones(2, 3), torch.ones(3, 2), torch.ones(6), torch.ones(2, 3).double(), [torch.ones(2, 3)],
        {"a": torch.ones(2, 3)}, {"b": torch.ones(2, 3)}, "1", 1, 1.0, None, [], [[]], torch.ones(()), torch.ones(0),
        torch.ones(3).bfloat16(), torch.ones(3, dtype=torch.bool),
    ]  # fmt: skip
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


def test_equal_contents_have_equal_fingerprints():
    transposed = torch.ones(2, 3).mT
    assert fingerprint(torch.ones(3, 2)) == fingerprint(transposed)
    assert fingerprint(torch.ones(3, 2)) == fingerprint(transposed.clone(memory_format=torch.contiguous_format))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
