"""The plan as a YAML file that can be edited and read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lightning_nettrim.layers import Layer, find_layers
from lightning_nettrim.pruning.budget import Budget
from lightning_nettrim.pruning.config import PruningConfig
from lightning_nettrim.pruning.plan import LayerSelection, Plan


def plan_to_yaml(plan: Plan, budgets: Mapping[str, Budget]) -> str:
    """The budgets of all layers as YAML, which `read_plan` reads."""
    layers = {
        name: {key: value for key in ("epsilon", "sparsity") if (value := getattr(budgets[name], key)) is not None}
        | {"pattern": budgets[name].pattern.to_config(), "refit": budgets[name].refit}
        | _unit_options(budgets[name])
        | {"shape": list(layer.parameter.shape), "followed_by": str(plan.contexts[name])}
        for name, layer in plan.layers.items()
    }
    skipped = {layer.name: layer.reason for layer in plan.skipped}
    return yaml.safe_dump({"layers": layers, "skipped": skipped}, sort_keys=False)


def _unit_options(budget: Budget) -> dict[str, Any]:
    """The options of a budget that concern inputs, as far as they are set, as primitives."""
    options = {
        "removed_inputs": list(budget.removed_inputs),
        "input_scales": list(budget.input_scales),
        "synthetic_inputs": dict(budget.synthetic_inputs),
    }
    return {name: value for name, value in options.items() if value}


def read_plan(path: str | Path, layers: Mapping[str, Layer]) -> dict[str, dict[str, Any]]:
    """The options of each layer in a plan file; layers that it does not name are left dense.

    Raises:
        ValueError: for a file that is not a plan, for an unknown layer and for a layer of another shape.
    """
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["layers"]
        options = {str(name): dict(row) for name, row in rows.items()}
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"plan: expected a plan.yaml as a dry run writes it, got {path}: {error!r}") from error
    for name, row in options.items():
        row.pop("followed_by", None)
        shape = row.pop("shape", None)
        if name not in layers:
            raise ValueError(f"plan: expected layers of this model, got {name!r}: it has {', '.join(layers)}")
        own = list(layers[name].parameter.shape)
        if shape is not None and shape != own:
            raise ValueError(f"plan: {name}: expected shape {own}, got {shape}: use the plan of this model")
    return options


def select_layers(config: PruningConfig, model: nn.Module) -> LayerSelection:
    """The selection of layers that the options define, by a plan file if one is given.

    Raises:
        ValueError: for a file that is not a plan of this model, and for other selections beside it.
    """
    if config.plan is None:
        return LayerSelection(config.budget, config.targets, config.ignore, config.per_layer)
    if not config.targets == config.ignore == config.per_layer is None:
        raise ValueError("plan: expected no targets, ignore or per_layer beside it, got some: edit the plan")
    options = read_plan(config.plan, find_layers(model)[0])
    return LayerSelection(config.budget, targets=list(options), per_layer=options)
