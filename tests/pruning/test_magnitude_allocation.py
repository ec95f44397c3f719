"""The allocation by magnitude depends on the trained weights, not on the current ones."""

from __future__ import annotations

import torch
from networks import ConvBlock, copied_state, equal_states

from lightning_nettrim import CalibrationSource, MagnitudeAllocation, PruningConfig, UniformAllocation
from lightning_nettrim.pruning.pruner import prune_network
from lightning_nettrim.pruning.session_setup import calibrate


def test_budgets_are_the_same_after_the_network_is_pruned():
    model = ConvBlock(False).eval()
    config = PruningConfig(sparsity=0.6, importance="equal")
    session = calibrate(model, CalibrationSource([torch.randn(40, 4, 6, 6)]), config)
    before, trained = MagnitudeAllocation().allocate(session, 0.7), copied_state(model)
    _, session = prune_network(session, UniformAllocation().allocate(session, 0.9))
    assert not equal_states(model, trained)
    assert MagnitudeAllocation().allocate(session, 0.7) == before
