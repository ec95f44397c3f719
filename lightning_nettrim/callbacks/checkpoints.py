"""Checkpoints that hold the pruned network, whatever other callbacks write into them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.optim.swa_utils import AveragedModel

from lightning_nettrim.layers import eager_name
from lightning_nettrim.runtime.sharded import full, is_sharded, local, local_part, sharded_like


def replace_weights(checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Replace the weights in a checkpoint by those of the model.

    Callbacks that average weights write their average, which is that of the dense network. Names that they or the
    module have removed are not added. Parameters that are divided among processes are gathered if process 0 writes all
    of them.
    """
    own, stored = model.state_dict(), checkpoint["state_dict"]
    gather = is_sharded(model) and not any(isinstance(value, Tensor) and is_sharded(value) for value in stored.values())
    for name, value in own.items():
        value = full(value) if gather and isinstance(value, Tensor) else value
        if isinstance(stored.get(name), Tensor):
            stored[name] = value
    if "current_model_state" in checkpoint:  # from which WeightAveraging resumes training
        checkpoint["current_model_state"] = own


def share_with_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Copy the weights of the module into the averages of other callbacks.

    WeightAveraging uses its average instead of the weights in every later validation and checkpoint.
    """
    for average in averaged_models(trainer):
        average.module.load_state_dict(pl_module.state_dict())


def averaged_models(trainer: pl.Trainer) -> list[AveragedModel]:
    """The averages of weights of all callbacks."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [value for each in callbacks for value in vars(each).values() if isinstance(value, AveragedModel)]


def verify(state: Mapping[str, Any], masks: Mapping[str, Tensor], what: str) -> None:
    """Check that every weight that a mask does not keep is zero; weights that are not in the state are skipped.

    Of a weight that is divided among processes, the part of this process is checked.

    Raises:
        RuntimeError: naming the first tensor that has other values.
    """
    for name, mask in masks.items():
        value = state.get(name)
        if value is not None and bool((local(value).cpu() != 0)[~local_part(mask, value).cpu()].any()):
            raise RuntimeError(
                f"{what}: expected zeros where {name} was pruned, got other values: a callback or the module replaces"
                " the weights in on_save_checkpoint; remove it"
            )


def verify_file(path: Path, masks: Mapping[str, Tensor]) -> None:
    """`verify` a file, unless it does not exist because another thread is still writing it."""
    if path.is_dir():
        for name, mask in masks.items():
            verify({name: _read_sharded(path, name)}, {name: mask}, str(path))
    elif path.is_file():
        content = torch.load(path, map_location="cpu", weights_only=False)
        verify(content["state_dict"], masks, str(path))


def _read_sharded(path: Path, name: str) -> Tensor | None:
    """One whole tensor of the weights in a folder that several processes have written; ``None`` if it is missing."""
    reader = distributed_checkpoint.FileSystemReader(path)
    stored: Any = reader.read_metadata().state_dict_metadata.get(f"state_dict.{name}")
    if stored is None:
        return None
    value = torch.empty(stored.size, dtype=stored.properties.dtype)
    distributed_checkpoint.load({"state_dict": {name: value}}, storage_reader=reader, no_dist=True)
    return value


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_best_is_kept(trainer: pl.Trainer) -> None:
    """Check that a ModelCheckpoint keeps a best checkpoint.

    Raises:
        MisconfigurationException: if there is none.
    """
    saver: Any = trainer.checkpoint_callback
    if saver is None or getattr(saver, "monitor", None) is None or getattr(saver, "save_top_k", 0) == 0:
        raise MisconfigurationException(
            "NetTrim: checkpoint='best': expected a ModelCheckpoint with a monitor that keeps its best file, got"
            f" {'none' if saver is None else 'one without'}: add ModelCheckpoint(monitor=...), or set checkpoint='last'"
        )


def load_best(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """Load the weights of ModelCheckpoint's best file into the module, in place, and return its path.

    Raises:
        RuntimeError: if there is no such file.
    """
    path = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    if not path:
        raise RuntimeError(
            "checkpoint='best': expected a best checkpoint, got none: the metric was not logged in this fit"
        )
    own = pl_module.state_dict()
    if Path(path).is_dir():  # each process reads its part of the weights
        checkpoint = torch.load(Path(path) / "meta.pt", map_location="cpu", weights_only=False)
        distributed_checkpoint.load({"state_dict": own}, checkpoint_id=path)
        checkpoint["state_dict"] = own
    else:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    pl_module.on_load_checkpoint(checkpoint)
    state = {
        name: sharded_like(value, own[name]) if isinstance(own.get(name), Tensor) else value
        for name, value in checkpoint["state_dict"].items()
    }
    pl_module.load_state_dict(state, strict=pl_module.strict_loading)
    return path


def accept_compiled_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before ``load_state_dict`` that translates names between compiled and eager modules."""
    renamed = by_own_names({name: name for name in state}, module, prefix)
    for name, stored in renamed.items():
        if name != stored and name not in state:
            state[name] = state.pop(stored)


def by_own_names(values: Mapping[str, Any], module: nn.Module, prefix: str = "") -> dict[str, Any]:
    """Values by the names that a module, compiled or not, has for its parameters and buffers."""
    own = {prefix + eager_name(name): prefix + name for name in module.state_dict()}
    return {own.get(prefix + eager_name(name.removeprefix(prefix)), name): value for name, value in values.items()}
