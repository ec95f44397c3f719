"""Models whose parameters are divided among processes by FSDP2: one parameter is gathered at a time, and written back.

Each process holds a part of every parameter, as a ``DTensor``. A forward pass gathers the parameters of one module
after the other, so that all processes must run the same forward passes. The functions here that are marked as
collective must be called by all processes in the same order as well. For other models they do nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_sharded(what: nn.Module | Tensor) -> bool:
    """Whether a tensor is divided among processes, or any parameter of a model is."""
    if isinstance(what, Tensor):
        kind = _loaded("torch.distributed.tensor", "DTensor")
        return kind is not None and isinstance(what, kind)
    return bool(units(what)) or any(is_sharded(parameter) for parameter in what.parameters())


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, without gradients; collective for a divided one."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor in this process, which shares its memory; of a tensor that is not divided, all of it."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def local_part(value: Tensor, like: Tensor) -> Tensor:
    """The part of a value that this process holds of another tensor of the same shape.

    Args:
        value: the whole value, or one that is divided like the other tensor.
        like: the other tensor.
    """
    part = local(value if is_sharded(value) or not is_sharded(like) else _divided(value, like))
    return part.to(local(like).device)


def sharded_like(value: Tensor, like: Tensor, dim: int | None = None) -> Tensor:
    """A copy of this process's part of a whole value, which `full` gathers again.

    Args:
        value: the whole value, the same in all processes.
        like: tensor that is divided in the same way; if it is not divided, the value is returned.
        dim: dimension that is divided, if the shapes differ.
    """
    if is_sharded(value) or not is_sharded(like):
        return value
    return _divided(value, like, dim).clone()


def is_averaged(parameter: Tensor) -> bool:
    """Whether a backward pass averages the gradient of a parameter over all processes."""
    return is_sharded(parameter) and parameter.device_mesh.size() > 1  # type: ignore[attr-defined]


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward pass has gathered, so that those of the model are the divided ones."""
    for unit in units(model):
        unit.reshard()


def recover(model: nn.Module) -> None:
    """Bring a model into the state before a forward pass, after one that was ended by an exception."""
    for unit in _roots(model):
        if hasattr(unit, "reset_iter_state"):  # since torch 2.14
            unit.reset_iter_state()
    reshard(model)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A `with` in which a module and its submodules have whole parameters, to be read; collective."""
    with ExitStack() as stack:
        for unit in units(module):
            if any(is_sharded(parameter) for parameter in unit.parameters()):
                unit.unshard()
                stack.callback(unit.reshard)
        yield


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without the one that ``fully_shard`` adds."""
    unit = _loaded("torch.distributed.fsdp", "FSDPModule")
    classes = type(module).__mro__
    return classes[classes.index(unit) + 1] if unit in classes else classes[0]


def check_sharding(model: nn.Module) -> None:
    """Check that the parameters of a model are divided among all processes by FSDP2, or not at all; collective.

    Raises:
        ValueError: naming a parameter that is divided in another way, as in tensor parallelism.
    """
    if not is_sharded(model):
        return
    reshard(model)
    names = {name for name, parameter in model.named_parameters() if is_sharded(parameter)}
    for name in sorted(names):
        parameter: Any = model.get_parameter(name)
        size, device = parameter.device_mesh.size(), parameter.device_mesh.device_type
        if parameter.device.type != device:
            raise ValueError(
                f"{name}: expected a parameter on {device}, where it is gathered, got {parameter.device}: remove the"
                " CPUOffloadPolicy of fully_shard"
            )
        if size not in (1, distributed.get_world_size()):
            raise ValueError(
                f"{name}: expected a parameter that is divided among all {distributed.get_world_size()} processes, got"
                f" one divided among {size}: pass a mesh of all processes to fully_shard"
            )
    for unit in units(model):
        unit.unshard()
        names &= {name for name, parameter in model.named_parameters() if is_sharded(parameter)}
        unit.reshard()
    if names:
        raise ValueError(
            f"{min(names)}: expected parameters that only FSDP2 (fully_shard) divides, got tensor parallelism"
            " (parallelize_module): prune the network with FSDP2, DDP or on a single device"
        )


def units(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on, the parameters of each of which are gathered together."""
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def _roots(model: nn.Module) -> list[Any]:
    found = units(model)
    inner = {id(part) for unit in found for part in unit.modules() if part is not unit}
    return [unit for unit in found if id(unit) not in inner]


def _divided(value: Tensor, like: Any, dim: int | None = None) -> Tensor:
    """A whole value, divided as another tensor; it may share the memory of the value."""
    module = sys.modules["torch.distributed.tensor"]
    mesh, placements = like.device_mesh, like.placements
    if dim is not None:
        placements = [module.Shard(dim) if placement.is_shard() else placement for placement in placements]
    device = torch.device(mesh.device_type) if value.device.type != mesh.device_type else value.device
    whole = [module.Replicate()] * mesh.ndim
    divided = module.DTensor.from_local(value.detach().to(device), mesh, whole, run_check=False)
    return divided.redistribute(placements=placements)


def _loaded(module: str, name: str) -> Any:
    """A class of a module of PyTorch; ``None`` if it has not been imported, so that there are no objects of it."""
    return getattr(sys.modules.get(module), name, None)
