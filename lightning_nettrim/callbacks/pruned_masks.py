"""The masks of a pruned network over several fits, validations and checkpoints."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_nettrim.callbacks.checkpoints import by_own_names
from lightning_nettrim.layers import masking
from lightning_nettrim.pruning.config import UNIT_LIMITS, PruningConfig
from lightning_nettrim.pruning.plan_file import select_layers
from lightning_nettrim.runtime.sharded import full

MIN_SPARSITY = 0.01
"""Fraction of exact zeros from which on a weight counts as pruned."""

BUDGET_OPTIONS = (
    "epsilon", "sparsity", *UNIT_LIMITS, "max_drop", "pattern", "select", "round_to", "per_layer", "targets", "ignore",
    "plan",
)  # fmt: skip
"""The options that determine how far a network is pruned."""


class PrunedMasks:
    """The masks of a network and the budget that it was pruned to.

    Args:
        config: the options of the callback.

    Attributes:
        masks: ``{parameter name: bool tensor}``, True where the weight is kept.
        budget: the options that the network was pruned by; empty if they are not known.
    """

    def __init__(self, config: PruningConfig) -> None:
        self._config = config
        self.masks: dict[str, Tensor] = {}
        self.budget = ""

    def state_dict(self) -> dict[str, Any]:
        """The masks and the budget, for a checkpoint."""
        return {"masks": dict(self.masks), "pruned_to": self.budget}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The masks and the budget of a checkpoint."""
        self.masks = dict(state["masks"])
        self.budget = state.get("pruned_to", self.requested_budget())

    def set(self, masks: dict[str, Tensor]) -> None:
        """The masks of a network that was pruned by the options of the callback."""
        self.masks, self.budget = masks, self.requested_budget()

    def requested_budget(self) -> str:
        """The options that determine how far to prune, as text."""
        options = {name: getattr(self._config, name) for name in BUDGET_OPTIONS}
        return json.dumps(options, default=str, sort_keys=True)

    def find(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """The masks that a network satisfies: those of this object, else those of its own zeros; empty if dense."""
        masks = by_own_names(self.masks, pl_module)
        if masks and masking.satisfied(pl_module, masks):
            return masks
        self.budget = ""
        return self._masks_of_zeros(pl_module)

    def _masks_of_zeros(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """The masks of a network that was pruned before and is given without them.

        Zeros of an initialization are excluded: there all values are zero, or all others are equal.
        """
        masks = {}
        for layer in select_layers(self._config, pl_module).find(pl_module)[0].values():
            weight = full(layer.parameter)
            if masking.sparsity({"": weight}) >= MIN_SPARSITY and len(weight[weight != 0].unique()) > 1:
                masks[layer.parameter_names()[0]] = weight != 0
        return masks

    def needs_pruning(self, masks: dict[str, Tensor]) -> bool:
        """Whether a pruned network is to be pruned to another budget.

        If it is not known how it was pruned, its zeros are compared with the requested sparsity.
        """
        if self.budget:
            return self.budget != self.requested_budget()
        sparsity = self._config.sparsity
        return sparsity is not None and masking.sparsity(masks) < sparsity - MIN_SPARSITY

    def describe(self, masks: dict[str, Tensor]) -> str:
        """What is known of a network that is given without masks, for messages."""
        share = masking.sparsity(masks)
        return f"the network has {share:.0%} exact zeros in {len(masks)} weights, so it is treated as pruned"

    def enforce_after_steps(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: dict[str, Tensor]
    ) -> list[RemovableHandle]:
        """Keep the zeros of these masks after every step of the trainer's optimizers, before weights are averaged."""
        self.masks = {name: mask.to(pl_module.device) for name, mask in masks.items()}
        own = masking.divided(pl_module, self.masks)
        return [
            optimizer.register_step_post_hook(lambda *_: masking.apply(pl_module, own))
            for optimizer in trainer.optimizers
            if hasattr(optimizer, "register_step_post_hook")
        ]
