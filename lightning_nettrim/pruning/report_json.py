"""The content of `report.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning_nettrim.pruning.results import PruningResult

SCHEMA_VERSION = 1
"""Of `report.json`; it changes when a key changes its name or meaning."""


def to_json(
    result: PruningResult,
    metrics: Mapping[str, Mapping[str, float]],
    arguments: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The content of `report.json`: primitives only, ``None`` for numbers that are not finite.

    Args:
        result: of pruning.
        metrics: of the ``dense`` and of the ``pruned`` network.
        arguments: the options.
        versions: of packages.
    """
    return _primitive(
        {
            "schema_version": SCHEMA_VERSION,
            "layers": [asdict(report) for report in result.reports],
            "skipped": [asdict(layer) for layer in result.skipped],
            "total": result.total(),
            "recovery": None if result.recovery is None else asdict(result.recovery),
            "trials": [asdict(trial) for trial in result.trials],
            "notes": result.notes,
            "metrics": metrics,
            "arguments": arguments,
            "versions": versions,
        }
    )


def _primitive(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _primitive(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_primitive(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
