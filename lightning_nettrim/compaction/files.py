"""Files of compact networks: safetensors with the removed channels as JSON, from which nothing is unpickled."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_nettrim.pruning.units.surgery import RemovedChannels, remove_channels
from lightning_nettrim.runtime.files import write_atomically

KEY = "lightning_nettrim.removed_channels"
"""Key of the metadata with the removed channels of each module."""

M = TypeVar("M", bound=nn.Module)


def save_compact(model: nn.Module, removed: Mapping[str, RemovedChannels], path: str | Path) -> None:
    """Write a compact network to a file.

    Args:
        model: the compact model.
        removed: ``{module: channels}`` that were removed from it.
        path: of the file.
    """
    _write(model.state_dict(), removed, path)


def save_without_channels(model: nn.Module, removed: Mapping[str, RemovedChannels], path: str | Path) -> None:
    """Write the compact form of a network with all its channels to a file.

    Args:
        model: the model with unread units.
        removed: ``{module: channels}`` to leave out.
        path: of the file.
    """
    state = model.state_dict()
    for module_path, channels in removed.items():
        module = copy.deepcopy(model.get_submodule(module_path))
        remove_channels(module, channels)
        state |= {f"{module_path}.{key}": value for key, value in module.state_dict().items()}
    _write(state, removed, path)


def load_compact(model: M, path: str | Path) -> M:
    """Make an ordinarily constructed model compact, and load the weights of a file; nothing is unpickled.

    Args:
        model: the model as it is constructed, with all its units; it is changed in place.
        path: file that `CompactResult.save` or `NetTrim` has written.

    Returns:
        The model.

    Raises:
        ModuleNotFoundError: without the package torch-pruning: install the extra ``compact``.
        ValueError: for a file that is not one of a compact network, or one of another network; the model is not
            changed.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = (file.metadata() or {}).get(KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"load_compact: expected a safetensors file, got {path}: {error}") from error
    if metadata is None:
        raise ValueError(
            f"load_compact: expected a file of a compact network, got {path} without removed channels: write it by"
            " CompactResult.save"
        )
    removed = {
        name: RemovedChannels(**{side: tuple(indices) for side, indices in channels.items()})
        for name, channels in json.loads(metadata).items()
    }
    compacted = _compacted_modules(model, removed, path)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for module_path, module in compacted.items():
        expected |= {f"{module_path}.{key}": tuple(value.shape) for key, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if different := sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name)):
        shape, other = (shapes.get(different[0], "none") for shapes in (expected, found))
        raise ValueError(
            f"load_compact: {different[0]}: expected shape {shape}, got {other} in {path}: construct the model as for"
            " training"
        )
    for module_path in compacted:
        remove_channels(model.get_submodule(module_path), removed[module_path])
    versioned = model.state_dict()  # it has the versions of its modules, without which some refuse it
    versioned.update(state)
    model.load_state_dict(versioned)
    return model


def _compacted_modules(model: nn.Module, removed: Mapping[str, RemovedChannels], path: str | Path) -> dict[str, Any]:
    """Copies of the modules that lose channels, without these."""
    compacted = {}
    for name, channels in removed.items():
        try:
            compacted[name] = copy.deepcopy(model.get_submodule(name))
            remove_channels(compacted[name], channels)
        except (AttributeError, KeyError, ValueError) as error:
            raise ValueError(
                f"load_compact: expected the file of a {type(model).__name__}, got {path}, which removes channels of"
                f" {name}: {error}"
            ) from error
    return compacted


def _write(state: Mapping[str, Tensor], removed: Mapping[str, RemovedChannels], path: str | Path) -> None:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    metadata = {KEY: json.dumps({name: asdict(channels) for name, channels in removed.items()})}
    write_atomically(Path(path), save(tensors, metadata))
